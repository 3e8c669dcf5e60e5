"""Watching the executions of a box behind a server."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from hutch.core import agentproto as proto
from hutch.errors import HutchError, UpstreamUnavailableError
from hutch.runtime.execution import COLLECT_LIMIT, Host
from hutch.runtime.home import new_id
from hutch.sdk.remote_doors import RemoteDoors
from hutch.sdk.remote_execution import RemoteExecution, connect
from hutch.sdk.remote_http import ConnectionFailed
from hutch.sdk.remote_lines import Lines
from hutch.sdk.remote_wire import NextBody
from hutch.types import BoxInfo, BoxState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hutch.core.sinks import Sink
    from hutch.runtime.execution import LocalExecution
    from hutch.sdk.remote_box import RemoteBox
    from hutch.sdk.remote_channel import RemoteChannel
    from hutch.sdk.remote_http import Http
    from hutch.sdk.remote_wire import ExecBody
    from hutch.types import ExecInfo, Result


class Owner(Protocol):
    """What a box needs of its runtime."""

    http: Http
    budget: float

    def spawn(self, function: Callable[..., Any], *args: Any) -> None: ...

    def disown(self, box_id: str) -> None: ...

    def removed(self, box_id: str) -> None: ...

    def ends(self, box_id: str) -> bool | None: ...

    def handle(self, info: BoxInfo) -> RemoteBox: ...


class WatchedBox(RemoteDoors):
    """A box and the executions that are watched in it."""

    def __init__(self, runtime: Owner, info: BoxInfo) -> None:
        super().__init__(runtime.http, info.id)
        self.name = info.name
        self._runtime = runtime
        self._executions: set[LocalExecution] = set()
        self.lines = Lines()

    async def info(self) -> BoxInfo:
        """Return the record and the state of the box."""
        return await self._http.get(self.path, BoxInfo)

    def runtime_closed(self) -> None:
        """End every wait."""
        for execution in list(self._executions):
            execution.runtime_closed()
        self.lines.close()

    async def _start_watched(self, body: ExecBody, **options: Any) -> RemoteExecution:
        """Start a command and watch it: on a connection that an earlier command has left, or on a new one."""
        watcher = new_id()
        if (channel := self.lines.take()) is not None:
            try:
                launched = await channel.launch(NextBody(watcher=watcher, exec=body))
            except ConnectionFailed:  # it may have been started all the same
                launched = await self._launch(body, unsure=True)
                channel = None
            except HutchError:
                if not self.lines.give(channel):
                    channel.close()
                raise
            except BaseException:
                channel.close()
                raise
        else:
            launched = await self._launch(body)
        return await self._watch(
            body.id, pid=launched.pid, oom_kills=launched.oom_kills, watcher=watcher, channel=channel, **options
        )

    async def _watch(
        self,
        exec_id: str,
        *,
        tty: bool,
        stdin: bool,
        sinks: Mapping[int, Sink | object],
        pid: int = 0,
        oom_kills: int | None = None,
        after: tuple[int, int] = (0, 0),
        collect: int | None = None,
        on_exit: Callable[[Result], Any] | None = None,
        watcher: str | None = None,
        channel: RemoteChannel | None = None,
    ) -> RemoteExecution:
        watcher = watcher or new_id()
        reconnect = functools.partial(connect, self._http, self.id, exec_id, watcher, self._runtime.budget, oom_kills)
        channel = channel or await reconnect()
        if channel is None:
            raise UpstreamUnavailableError(
                f"box {self.name or self.id} ended before execution {exec_id} could be watched"
            )

        async def connect_again() -> RemoteChannel | None:
            again = await reconnect()
            if again is not None and execution.finished:  # it was closed meanwhile
                again.close()
            return again

        host = Host(
            box=self.id,
            reconnect=connect_again,
            spawn=self._runtime.spawn,
            oom_kills=lambda: None,
            paused=lambda: False,
            forget=self._forget,
            own_channel=True,
        )
        execution = RemoteExecution(
            host,
            channel,
            exec_id,
            tty=tty,
            stdin=stdin,
            collect_limit=COLLECT_LIMIT if collect is None else collect,
            on_exit=on_exit,
        )
        execution.probe = self._probe
        execution.forget = collect is not None
        self._executions.add(execution)
        execution.rewind({proto.STDOUT: after[0], proto.STDERR: after[1]})
        try:
            for stream, sink in sinks.items():
                execution.set_sink(stream, sink)
            if collect is not None:
                execution.set_collectors()
            await execution.begin(pid)
        except BaseException:
            await execution.close()
            raise
        return execution

    def _forget(self, execution: LocalExecution) -> None:
        if execution not in self._executions:
            return
        self._executions.remove(execution)
        assert isinstance(execution, RemoteExecution)
        channel = execution.leave_channel()
        if channel is None:
            execution.close_channel()
        elif not self.lines.give(channel):
            channel.close()

    async def _probe(self) -> list[ExecInfo]:
        if (await self.info()).state is BoxState.PAUSED:  # who is frozen cannot answer
            return []
        return await self.executions()

    async def _kill_unseen(self, exec_id: str) -> None:
        """Kill what nobody waits for any more; the request to start it may still be on its way."""
        for pause in (0.0, 0.2, 1.0):
            await anyio.sleep(pause)
            with contextlib.suppress(HutchError):
                return await self.signal_execution(exec_id, 9)
