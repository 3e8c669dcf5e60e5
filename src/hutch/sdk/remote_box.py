"""A box behind a server."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

import anyio

from hutch.core import agentproto as proto
from hutch.core import ids
from hutch.errors import (
    HutchError,
    InvalidArgumentError,
    NotFoundError,
    StorageError,
    UpstreamUnavailableError,
)
from hutch.runtime.checks import (
    check_bytes,
    check_callable,
    check_path,
    check_seconds,
    check_sink,
    check_size,
    check_start,
    check_text,
    check_whole,
    quoted,
)
from hutch.runtime.execution import COLLECT_LIMIT, DISCARD
from hutch.runtime.files import BoxFiles
from hutch.runtime.follow import follow_log
from hutch.runtime.home import new_id
from hutch.runtime.lives import MAIN
from hutch.runtime.ports import BoxPorts
from hutch.sdk.remote_channel import dial
from hutch.sdk.remote_doors import exec_body
from hutch.sdk.remote_network import RemoteNetwork
from hutch.sdk.remote_snapshots import RemoteSnapshots
from hutch.sdk.remote_watching import Owner, WatchedBox
from hutch.sdk.remote_wire import NameBody, SignalBody, StartBody, StopBody, Waited
from hutch.types import BoxInfo, BoxStats

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from hutch.core.sinks import Sink
    from hutch.runtime.command import Command
    from hutch.sdk.remote_execution import RemoteExecution
    from hutch.types import LogEntry, Result

_MAX_POSITION = (1 << 64) - 1
# One answer of the server to a wait for the end of a box comes at the latest after this time.
_WAIT_SECONDS = 20.0


class RemoteBox(WatchedBox):
    """A handle on one box. Implements `hutch.sdk.base.Box`."""

    def __init__(self, runtime: Owner, info: BoxInfo) -> None:
        super().__init__(runtime, info)
        self.files = BoxFiles(self)
        self.snapshots = RemoteSnapshots(runtime.http, self.path)
        self.network = RemoteNetwork(runtime.http, self.path)
        self.ports = BoxPorts(self, runtime.spawn)

    def __repr__(self) -> str:
        return f"<hutch box {self.id}{f' {self.name!r}' if self.name else ''} at {self._http.url}>"

    # Life.

    async def start(self) -> None:
        """Start the box and its main command. Nothing happens when it runs."""
        await self._post("start", StartBody())

    async def start_attached(
        self, *, rows: int = 24, cols: int = 80, stdout: Sink | None = None, stderr: Sink | None = None
    ) -> RemoteExecution:
        """Start the box and watch its main command from its first byte. See `hutch.sdk.base.Box.start_attached`."""
        check_size(rows, cols)
        for sink in (stdout, stderr):
            if sink is not None:
                check_sink("the sink", sink)
        info = await self.info()
        await self._post("start", StartBody(fresh=True, rows=rows, cols=cols))
        sinks = {proto.STDOUT: stdout, proto.STDERR: stderr}
        return await self._watch(
            MAIN,
            tty=info.tty,
            stdin=info.open_stdin,
            oom_kills=0,  # in this life of the box
            sinks={stream: DISCARD if sink is None else sink for stream, sink in sinks.items()},
        )

    async def stop(self, *, timeout: float = 5.0) -> None:
        """Stop the box: the stop signal, SIGKILL after ``timeout`` seconds. The files stay."""
        check_seconds("timeout", timeout, endless=False)
        await self._post("stop", StopBody(timeout=timeout))

    async def restart(self, *, timeout: float = 5.0) -> None:
        """`stop`, then `start`."""
        await self.stop(timeout=timeout)
        await self.start()

    async def pause(self) -> None:
        """Freeze the box until `resume`. See `hutch.sdk.base.Box.pause`."""
        await self._post("pause")

    async def resume(self) -> None:
        """Let a paused box go on."""
        await self._post("resume")

    async def kill(self, signum: int = 9) -> None:
        """Send a signal to the main command; SIGKILL ends the whole box."""
        check_whole("signal", signum, 1, 64)
        await self._post("kill", SignalBody(signal=signum))

    async def detach(self) -> None:
        """Let the box go on when the runtime that made it is closed."""
        await self._post("detach")
        self._runtime.disown(self.id)

    async def remove(self, *, force: bool = False) -> None:
        """Remove the box and all that it held. A running box needs ``force``."""
        await self._http.call("DELETE", self.path, object, query={"force": int(force)})
        self._runtime.removed(self.id)

    async def wait(self) -> int | None:
        """Wait until the box does not run any more; returns the main command's exit code, if it has one."""
        while True:
            answer = await self._http.get(f"{self.path}/wait", Waited, seconds=_WAIT_SECONDS)
            if not answer.running:
                return answer.exit_code

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            # To the server every box is detached; those that end with us are known here.
            remove = self._runtime.ends(self.id)
            with contextlib.suppress(NotFoundError):
                if remove:
                    await self.remove(force=True)
                elif remove is not None:
                    await self.stop()

    # Commands.

    async def exec(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tty: bool = False,
        rows: int = 24,
        cols: int = 80,
        stdin: bool = False,
        stdout: Sink | object | None = None,
        stderr: Sink | object | None = None,
        timeout: float | None = None,
        kill_after: float = 2.0,
        linger: float | None = 0.3,
        on_exit: Callable[[Result], Any] | None = None,
    ) -> RemoteExecution:
        """Start a command and return it running. See `hutch.sdk.base.Box.exec`."""
        check_size(rows, cols)
        sinks = {proto.STDOUT: stdout, proto.STDERR: stderr}
        return await self._start(
            command,
            env=env,
            cwd=cwd,
            user=user,
            tty=(rows, cols) if tty else None,
            stdin=bool(stdin),
            timeout=timeout,
            kill_after=kill_after,
            linger=linger,
            on_exit=on_exit,
            sinks={stream: sink for stream, sink in sinks.items() if sink is not None},
        )

    async def run(
        self,
        *command: str,
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        kill_after: float = 2.0,
        linger: float | None = 0.3,
        max_output: int = COLLECT_LIMIT,
    ) -> Result:
        """Run a command to its end and return what it wrote. When the call is cancelled the command is killed:
        nobody could wait for it."""
        check_whole("max_output", max_output, 0, sys.maxsize)
        if input is not None:
            check_bytes("input", input)
        execution = await self._start(
            command,
            env=env,
            cwd=cwd,
            user=user,
            stdin=input is not None,
            timeout=timeout,
            kill_after=kill_after,
            linger=linger,
            collect=max_output,
        )
        if input is not None:
            execution.feed(input)
        try:
            return await execution.wait_with_agent()
        finally:
            await self.dispose(execution)

    def command(self, *argv: str, **options: Any) -> Command:
        """Describe a command to be run later; the options are those of `hutch.Command`."""
        from hutch.runtime.command import Command

        return Command(self, *argv, **options)

    async def attach(
        self,
        exec_id: str = MAIN,
        *,
        after: tuple[int, int] = (0, 0),
        stdout: Sink | None = None,
        stderr: Sink | None = None,
    ) -> RemoteExecution:
        """Watch an execution that was started by anyone, from the given positions of (stdout, stderr)."""
        check_text("the id of an execution", exec_id)
        if not isinstance(after, tuple) or len(after) != 2:
            raise InvalidArgumentError(f"after {quoted(after)} is not a pair of positions")
        for position in after:
            check_whole("the position in an output", position, 0, _MAX_POSITION)
        known = [execution for execution in await self.executions() if execution.id == exec_id]
        if not known:
            # The relay knows whether there ever was one, and refuses by the right name.
            if ids.is_id(exec_id):
                (await dial(self._http, self.id, exec_id, new_id())).close()
            raise NotFoundError(f"box {self.name or self.id} has no execution {quoted(exec_id)}")
        sinks = {proto.STDOUT: stdout, proto.STDERR: stderr}
        return await self._watch(
            exec_id,
            tty=known[0].tty,
            stdin=True,
            pid=known[0].pid,
            after=after,
            sinks={stream: sink for stream, sink in sinks.items() if sink is not None},
        )

    async def stats(self) -> BoxStats:
        """Measure what the box uses."""
        return await self._http.get(f"{self.path}/stats", BoxStats)

    def logs(self, *, follow: bool = False, tail: int | None = None) -> AsyncIterator[LogEntry]:
        """What the main command wrote. See `hutch.sdk.base.Box.logs`."""
        return follow_log(self, self._runtime.spawn, follow=follow, tail=tail)

    async def clone(self, name: str | None = None) -> RemoteBox:
        """Make a new, stopped box with a copy of this one's disk and configuration."""
        return self._runtime.handle(await self._http.call("POST", f"{self.path}/clone", BoxInfo, NameBody(name=name)))

    async def fork(self, name: str | None = None) -> RemoteBox:
        """Make a new box that goes on where this one is. See `hutch.sdk.base.Box.fork`."""
        return self._runtime.handle(await self._http.call("POST", f"{self.path}/fork", BoxInfo, NameBody(name=name)))

    async def export(self, path: str | Path) -> None:
        """Write the box (disk, configuration, image) to an archive file."""
        target = check_path("the archive", path)
        partial = target.with_name(f".{target.name}.{new_id()}")
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                async with self._http.stream("GET", f"{self.path}/export") as response:
                    async for piece in response.aiter_bytes():
                        await anyio.to_thread.run_sync(file.write, piece)
            partial.replace(target)
        except OSError as error:
            raise StorageError(f"{target}: {error}") from None
        finally:
            partial.unlink(missing_ok=True)

    # What other parts of the product use.

    async def start_file_op(self, op: proto.FileOp, path: str, **options: Any) -> RemoteExecution:
        """Start a file operation of the agent: an execution like any other."""
        if not check_text("the path", path):
            raise InvalidArgumentError("the path is empty")
        return await self._start((), file_op=op, path=path, **options)

    async def dispose(self, execution: RemoteExecution) -> None:
        """Kill an internal execution if it still runs, and let the box forget it."""
        if not execution.finished:
            self._runtime.spawn(self._kill_unseen, execution.id)
        await execution.close()

    # Private methods.

    async def _start(
        self,
        command: tuple[str, ...],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tty: tuple[int, int] | None = None,
        stdin: bool = False,
        timeout: float | None = None,
        kill_after: float = 2.0,
        linger: float | None = 0.3,
        on_exit: Callable[[Result], Any] | None = None,
        sinks: Mapping[int, Sink | object] | None = None,
        collect: int | None = None,
        file_op: proto.FileOp | None = None,
        path: str = "",
    ) -> RemoteExecution:
        check_start(command, env, cwd, user, timeout, kill_after, linger, file_op)
        for sink in (sinks or {}).values():
            if sink is not DISCARD:
                check_sink("the sink", sink)
        check_callable("on_exit", on_exit)
        exec_id = new_id()
        try:
            return await self._start_watched(
                exec_body(
                    exec_id,
                    command,
                    env=env,
                    cwd=cwd,
                    user=user,
                    tty=tty,
                    stdin=stdin,
                    timeout=timeout,
                    kill_after=kill_after,
                    linger=linger,
                    file_op=None if file_op is None else int(file_op),
                    path=path,
                ),
                tty=tty is not None,
                stdin=stdin,
                sinks=sinks or {},
                collect=collect,
                on_exit=on_exit,
            )
        except BaseException as error:
            if not isinstance(error, HutchError) or isinstance(error, UpstreamUnavailableError):
                self._runtime.spawn(self._kill_unseen, exec_id)
            raise
