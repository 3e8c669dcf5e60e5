"""`Command`: a command that is described first and run later, after the model of Go's os/exec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from hutch.errors import InvalidStateError
from hutch.runtime.checks import check_bytes
from hutch.runtime.execution import DISCARD

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hutch.core.sinks import Sink
    from hutch.runtime.execution import LocalExecution
    from hutch.types import Result


class Executor(Protocol):
    """A box, as far as its commands go."""

    async def exec(self, *command: Any, **options: Any) -> LocalExecution: ...


class Command:
    """A command for one run in one box.

    ``stdout`` and ``stderr`` are sinks: an object with ``write(bytes)`` or a callable; ``None`` throws the stream
    away. ``stdin`` is bytes to feed. ``on_exit`` is called with the result after the last output and before `wait`
    returns.

        command = Command(box, "make", "-j2", stdout=sys.stdout.buffer)
        result = await command.run()
    """

    def __init__(
        self,
        box: Executor,
        *argv: str,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: bytes | None = None,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
        timeout: float | None = None,
        kill_after: float = 2.0,
        linger: float | None = 0.3,
        on_exit: Callable[[Result], Any] | None = None,
    ) -> None:
        self._box = box
        self._argv = argv
        self._options: dict[str, Any] = {
            "env": env,
            "cwd": cwd,
            "user": user,
            "stdout": DISCARD if stdout is None else stdout,
            "stderr": DISCARD if stderr is None else stderr,
            "timeout": timeout,
            "kill_after": kill_after,
            "linger": linger,
            "on_exit": on_exit,
        }
        if stdin is not None:
            check_bytes("stdin", stdin)
        self._stdin = stdin
        self._execution: LocalExecution | None = None

    @property
    def execution(self) -> LocalExecution:
        """The execution, after `start`. Raises `InvalidStateError` before."""
        if self._execution is None:
            raise InvalidStateError("the command was not started")
        return self._execution

    async def start(self) -> LocalExecution:
        """Start it. Raises `ExecError` when it cannot be started, `InvalidStateError` the second time."""
        if self._execution is not None:
            raise InvalidStateError("the command was started already; make another one to run it again")
        self._execution = await self._box.exec(*self._argv, stdin=self._stdin is not None, **self._options)
        if self._stdin is not None:
            self._execution.feed(self._stdin)
        return self._execution

    async def wait(self, timeout: float | None = None) -> Result:
        """Wait for the end and for every byte to be delivered."""
        return await self.execution.wait(timeout)

    async def run(self) -> Result:
        """`start` and `wait`."""
        await self.start()
        return await self.wait()
