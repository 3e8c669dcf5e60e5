"""An execution joined to this process: its streams, its terminal, its signals, its end."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

import anyio

from hutch.cli import output, terminal
from hutch.cli.session import STOPPED_BY
from hutch.errors import InvalidStateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hutch.cli.session import Session
    from hutch.core.sinks import Sink
    from hutch.sdk.base import Execution
    from hutch.types import Result

# How long a command has to end once it was asked to, and within which a second Ctrl-C counts as one.
_PATIENCE = 2.0


class Interrupts:
    """What Ctrl-C means: SIGINT for the command; again within two seconds SIGTERM; a third time: leave."""

    def __init__(self) -> None:
        self._last = float("-inf")
        self._count = 0

    def press(self, now: float) -> int | None:
        """Return the signal to pass on, `None` to leave. ``now`` is in seconds of any clock."""
        self._count = self._count + 1 if now - self._last <= _PATIENCE else 1
        self._last = now
        return {1: signal.SIGINT, 2: signal.SIGTERM}.get(self._count)


class Connection:
    """Serves one execution until it ends, or until the caller detaches (then ``detached`` is true).

    ``timeout``: seconds after which the command is ended: by the box, or else (``end_in_time``) from here.
    """

    def __init__(
        self,
        session: Session,
        *,
        tty: bool,
        stdin: bool,
        timeout: float | None = None,
        end_in_time: bool = False,
    ) -> None:
        self.detached = False
        self._session = session
        self._tty = tty
        self._stdin = stdin
        self._timeout = timeout or None
        self._end_in_time = end_in_time
        self._timed_out = False
        self._interrupts = Interrupts()
        self._asked_to_end = False
        self._tasks = anyio.create_task_group()
        self._waiting = anyio.CancelScope()

    async def serve(self, start: Callable[[Sink, Sink], Awaitable[Execution]]) -> int:
        """Start (or attach to) the execution with our sinks, serve it, and return the exit code of the tool.

        Raises the first error of a standard stream; `BrokenPipeError` means that its reader has gone.
        """
        out, err = (terminal.OutputFile(fd, self._gone) for fd in (terminal.STDOUT, terminal.STDERR))
        with contextlib.ExitStack() as stack:
            async with self._tasks:
                self._execution = await start(out, err)
                stack.enter_context(self._session.on_signal(self._on_signal))
                if self._tty and self._stdin:
                    stack.enter_context(terminal.raw(terminal.STDIN))
                if self._tty:
                    self._tasks.start_soon(self._follow_size)
                if self._stdin:
                    self._tasks.start_soon(self._forward_input)
                if self._timeout and self._end_in_time:
                    self._tasks.start_soon(self._end_after, self._timeout)
                with self._waiting:
                    result = await self._execution.wait()
                self._tasks.cancel_scope.cancel()
        if self.detached:
            await self._execution.close()
            return 0
        return self._exit_code(result)

    def _exit_code(self, result: Result) -> int:
        if result.timed_out or self._timed_out:
            output.note(f"timed out after {self._timeout or 0:g}s")
        if result.oom_killed:
            output.note("the box ran out of memory and the kernel ended a process of it")
        return result.exit_code if result.exit_code >= 0 else STOPPED_BY - result.exit_code

    async def _forward_input(self) -> None:
        keys = terminal.DetachKeys() if self._tty else None
        with contextlib.suppress(InvalidStateError):  # the command has ended
            async for typed in terminal.read(terminal.STDIN):
                data = typed
                if keys is not None:
                    data, self.detached = keys.feed(typed)
                if data:
                    await self._execution.stdin.write(data)
                if self.detached:
                    self._waiting.cancel()
                    return
            await self._execution.stdin.close()

    async def _follow_size(self) -> None:
        with contextlib.suppress(InvalidStateError):
            await terminal.follow_size(terminal.STDIN, self._execution.resize)

    async def _end_after(self, seconds: float) -> None:
        await anyio.sleep(seconds)
        self._timed_out = True
        await self._end(signal.SIGTERM)

    def _on_signal(self, signum: int) -> None:
        if signum == signal.SIGINT:
            forward = self._interrupts.press(anyio.current_time())
            if forward is None:
                self._session.leave(signum)
            else:
                self._tasks.start_soon(self._pass_on, forward)
        elif self._asked_to_end:
            self._session.leave(signum)
        else:
            self._asked_to_end = True
            self._tasks.start_soon(self._leave_soon, signum)

    async def _leave_soon(self, signum: int) -> None:
        await self._pass_on(signum)
        await anyio.sleep(_PATIENCE)
        self._session.leave(signum)

    def _gone(self) -> None:
        # What a local command would meet: SIGPIPE. `wait` then raises the error of the stream.
        self._tasks.start_soon(self._end, signal.SIGPIPE)

    async def _end(self, signum: int) -> None:
        await self._pass_on(signum)
        await anyio.sleep(_PATIENCE)
        await self._pass_on(signal.SIGKILL)

    async def _pass_on(self, signum: int) -> None:
        with contextlib.suppress(InvalidStateError):  # it has ended
            await self._execution.signal(signum)
