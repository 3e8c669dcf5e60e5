"""A box: commands, files, snapshots, life and death, for the process that holds the runtime."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import anyio

from hutch.core import agentproto as proto
from hutch.errors import (
    HutchError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
)
from hutch.runtime import starting
from hutch.runtime.checks import (
    check_bytes,
    check_callable,
    check_seconds,
    check_sink,
    check_size,
    check_start,
    check_text,
    check_whole,
    quoted,
)
from hutch.runtime.doors import Doors
from hutch.runtime.execution import COLLECT_LIMIT, DISCARD, Host, LocalExecution
from hutch.runtime.files import BoxFiles
from hutch.runtime.follow import follow_log
from hutch.runtime.gatekeeper import is_served
from hutch.runtime.home import new_id
from hutch.runtime.lives import MAIN
from hutch.runtime.network import BoxNetwork
from hutch.runtime.ports import BoxPorts
from hutch.runtime.snapshots import BoxSnapshots
from hutch.types import BoxState, BoxStats, ExecInfo, Isolation

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from hutch.core.sinks import Sink
    from hutch.runtime.channel import AgentChannel
    from hutch.runtime.command import Command
    from hutch.runtime.runtime import LocalRuntime
    from hutch.types import BoxInfo, LogEntry, Result


_MAX_POSITION = (1 << 64) - 1


class LocalBox(Doors):
    """A handle on one box. Implements `hutch.sdk.base.Box`."""

    def __init__(self, runtime: LocalRuntime, box_id: str, name: str | None) -> None:
        super().__init__(runtime, box_id, name)
        self.files = BoxFiles(self)
        self.snapshots = BoxSnapshots(runtime, box_id)
        self.network = BoxNetwork(runtime, box_id)
        self.ports = BoxPorts(self, runtime.spawn)
        self._executions: set[LocalExecution] = set()
        self._host = self._make_host(own_channel=False, forget=self._executions.discard)
        self._watcher_host = self._make_host(own_channel=True, forget=self._forget_watcher)

    def __repr__(self) -> str:
        return f"<hutch box {self.id}{f' {self.name!r}' if self.name else ''}>"

    # Life.

    async def info(self) -> BoxInfo:
        """Return the record and the state of the box."""
        return await self._runtime.records.info(self.id)

    async def start(self) -> None:
        """Start the box and its main command. Nothing happens when it runs."""
        await self._lives.start(self.id)

    async def start_attached(
        self,
        *,
        rows: int = 24,
        cols: int = 80,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
    ) -> LocalExecution:
        """Start the box and watch its main command from its first byte. See `hutch.sdk.base.Box.start_attached`."""
        check_size(rows, cols)
        record = self._check_job()
        made: list[LocalExecution] = []

        @contextlib.asynccontextmanager
        async def watch(channel: AgentChannel) -> AsyncIterator[tuple[tuple[int, int], LocalExecution]]:
            spec = record.spec
            self._counts_oom = spec.limits.memory_mib is not None
            execution = LocalExecution(self._host, channel, MAIN, tty=spec.tty, stdin=spec.open_stdin)
            for stream, sink in ((proto.STDOUT, stdout), (proto.STDERR, stderr)):
                execution.set_sink(stream, DISCARD if sink is None else sink)
            self._executions.add(execution)
            made.append(execution)
            try:
                yield (rows, cols), execution
            except BaseException:
                await execution.close()
                raise

        await self._lives.start_watched(self.id, watch)
        return made[0]

    async def stop(self, *, timeout: float = 5.0) -> None:
        """Stop the box: the stop signal, SIGKILL after ``timeout`` seconds. The files stay."""
        check_seconds("timeout", timeout, endless=False)
        await self._lives.stop(self.id, timeout)

    async def restart(self, *, timeout: float = 5.0) -> None:
        """`stop`, then `start`."""
        await self.stop(timeout=timeout)
        await self.start()

    async def pause(self) -> None:
        """Freeze the box until `resume`. See `hutch.sdk.base.Box.pause`."""
        await self._lives.pause(self.id)

    async def resume(self) -> None:
        """Let a paused box go on."""
        await self._lives.resume(self.id)

    async def kill(self, signum: int = 9) -> None:
        """Send a signal to the main command; SIGKILL ends the whole box."""
        check_whole("signal", signum, 1, 64)
        if not (await self.info()).pid:
            raise InvalidStateError(f"box {self.name or self.id} does not run")
        if signum == 9:
            await self._lives.stop(self.id, 0.0)
            return
        channel = await self._lives.channel(self.id)
        await channel.request(lambda req: proto.signal(MAIN, signum, req=req))

    async def detach(self) -> None:
        """Let the box go on when the runtime that made it is closed."""
        await self._lives.detach(self.id)

    async def remove(self, *, force: bool = False) -> None:
        """Remove the box and all that it held. A running box needs ``force``."""
        await self._runtime.remove(self.id, force=force)

    async def wait(self) -> int | None:
        """Wait until the box does not run any more; returns the main command's exit code, if it has one."""
        await self._lives.wait_gone(self.id)
        return (await self.info()).exit_code

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            try:
                info = await self.info()
                if info.detach:
                    return
                if info.auto_remove:
                    await self.remove(force=True)
                else:
                    await self.stop()
            except NotFoundError:
                return

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
    ) -> LocalExecution:
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
            await self._dispose(execution)

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
    ) -> LocalExecution:
        """Watch an execution that was started by anyone, from the given positions of (stdout, stderr)."""
        check_text("the id of an execution", exec_id)
        if not isinstance(after, tuple) or len(after) != 2:
            raise InvalidArgumentError(f"after {quoted(after)} is not a pair of positions")
        for position in after:
            check_whole("the position in an output", position, 0, _MAX_POSITION)
        channel = await self._lives.channel(self.id, start=False)
        record = await starting.find(channel, exec_id, self.name or self.id)
        channel = await self._channels.own(self.id)
        execution = LocalExecution(self._watcher_host, channel, exec_id, tty=record.tty, stdin=True)
        self._executions.add(execution)
        execution.pid = record.pid
        execution.rewind({proto.STDOUT: after[0], proto.STDERR: after[1]})
        for stream, sink in ((proto.STDOUT, stdout), (proto.STDERR, stderr)):
            if sink is not None:
                execution.set_sink(stream, sink)
        try:
            await execution.attach_first()
        except BaseException:
            await execution.close()
            raise
        return execution

    async def executions(self) -> list[ExecInfo]:
        """List the executions that the box knows: those that run, and those that ended in the last minutes."""
        channel = await self._lives.channel(self.id, start=False)
        return [starting.info(record) for record in await starting.records(channel)]

    async def stats(self) -> BoxStats:
        """Measure what the box uses."""
        channel = await self._lives.channel(self.id, start=False)
        answer = await channel.request(lambda req: proto.simple(proto.Request.STATS, req=req))
        if not isinstance(answer, proto.AgentStats):
            raise HutchError("the box's agent gave another answer than was asked for")
        engine, directory = self._runtime.engines.of_box(self.id)
        usage = engine.usage(directory)
        served = is_served(self._runtime.store.box(self.id).spec)
        traffic = await self._runtime.gatekeeper.report(self.id) if served else None
        return BoxStats(
            memory_bytes=usage.memory_bytes,
            memory_limit_bytes=usage.memory_limit_bytes,
            cpu_seconds=usage.cpu_seconds,
            pids=usage.pids if usage.pids is not None else answer.processes,
            oom_kills=answer.oom_kills if engine.name == Isolation.VM else usage.oom_kills,
            disk_bytes=await self._runtime.disks.written(self.id),
            uptime_seconds=answer.uptime,
            commands_started=answer.started,
            commands_failed=answer.failed,
            output_bytes=answer.output_bytes,
            input_bytes=answer.input_bytes,
            network_sent_bytes=None if traffic is None else traffic.sent,
            network_received_bytes=None if traffic is None else traffic.received,
            network_connections=None if traffic is None else traffic.connections,
        )

    def logs(self, *, follow: bool = False, tail: int | None = None) -> AsyncIterator[LogEntry]:
        """What the main command wrote. See `hutch.sdk.base.Box.logs`."""
        return follow_log(self, self._runtime.spawn, follow=follow, tail=tail)

    async def clone(self, name: str | None = None) -> LocalBox:
        """Make a new, stopped box with a copy of this one's disk and configuration."""
        return await self._runtime.copies.clone(self.id, name)

    async def fork(self, name: str | None = None) -> LocalBox:
        """Make a new box that goes on where this one is. See `hutch.sdk.base.Box.fork`."""
        return await self._runtime.copies.fork(self.id, name)

    async def export(self, path: str | Path) -> None:
        """Write the box (disk, configuration, image) to an archive file."""
        await self._runtime.copies.export(self.id, path)

    # What the runtime uses.

    def runtime_closed(self) -> None:
        """End every wait."""
        for execution in list(self._executions):
            execution.runtime_closed()

    async def start_file_op(self, op: proto.FileOp, path: str, **options: Any) -> LocalExecution:
        """Start a file operation of the agent: an execution like any other."""
        if not check_text("the path", path):
            raise InvalidArgumentError("the path is empty")
        return await self._start((), file_op=op, path=path, **options)

    async def dispose(self, execution: LocalExecution) -> None:
        """Kill an internal execution if it still runs, and let the box forget it."""
        await self._dispose(execution)

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
    ) -> LocalExecution:
        check_start(command, env, cwd, user, timeout, kill_after, linger, file_op)
        for sink in (sinks or {}).values():
            if sink is not DISCARD:
                check_sink("the sink", sink)
        check_callable("on_exit", on_exit)
        channel = await self._lives.channel(self.id)
        self._counts_oom = self._channels.settings(self.id).spec.limits.memory_mib is not None
        execution = LocalExecution(
            self._host,
            channel,
            new_id(),
            tty=tty is not None,
            stdin=stdin,
            collect_limit=COLLECT_LIMIT if collect is None else collect,
            on_exit=on_exit,
            starting=True,
        )
        for stream, sink in (sinks or {}).items():
            execution.set_sink(stream, sink)
        if collect is not None:
            execution.set_collectors()
        self._executions.add(execution)
        try:
            pid, watched = await starting.start(
                self._channels,
                self.id,
                channel,
                execution.id,
                command,
                env=env,
                cwd=cwd,
                user=user,
                tty=tty,
                stdin=stdin,
                execution=execution,
                timeout=timeout,
                kill_after=kill_after,
                linger=linger,
                file_op=file_op,
                path=path,
            )
        except BaseException:
            await execution.close()
            raise
        execution.started(pid, watched=watched)
        return execution

    async def _dispose(self, execution: LocalExecution) -> None:
        if execution.finished:
            execution.send(proto.simple(proto.Request.FORGET, req=0, exec_id=execution.id))
        else:
            starting.kill_unseen(self._channels.find(self.id), execution.id)
        await execution.close()

    def _make_host(self, *, own_channel: bool, forget: Callable[[LocalExecution], None]) -> Host:
        return Host(
            box=self.id,
            reconnect=lambda: self._channels.reconnect(self.id, own=own_channel),
            spawn=self._runtime.spawn,
            oom_kills=lambda: self._oom_kills(self._runtime.home.box(self.id)),
            paused=lambda: self._runtime.store.box(self.id).state is BoxState.PAUSED,
            forget=forget,
            own_channel=own_channel,
        )

    def _forget_watcher(self, execution: LocalExecution) -> None:
        self._executions.discard(execution)
        execution.close_channel()
