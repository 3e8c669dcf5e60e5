"""What a server needs of a box behind another server, beyond `hutch.sdk.base`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hutch.core.frames import MAX_PAYLOAD
from hutch.errors import InvalidArgumentError, InvalidStateError
from hutch.runtime.logs import Record
from hutch.sdk.remote_channel import dial
from hutch.sdk.remote_http import ConnectionFailed
from hutch.sdk.remote_link import RemoteLink
from hutch.sdk.remote_wire import ExecBody, Launched, SignalBody, StartBody, dumps
from hutch.types import ExecInfo

if TYPE_CHECKING:
    from hutch.sdk.remote_http import Http


class RemoteDoors:
    """A box at a server, by its id. `hutch.runtime.doors.Doors` has the same."""

    def __init__(self, http: Http, box_id: str) -> None:
        self.id = box_id
        self.path = f"/v1/x/boxes/{quote(box_id, safe='')}"
        self._http = http

    async def executions(self) -> list[ExecInfo]:
        """List the executions that the box knows: those that run, and those that ended in the last minutes."""
        return await self._http.get(f"{self.path}/executions", list[ExecInfo])

    async def launch(self, exec_id: str, command: tuple[str, ...], **options: Any) -> tuple[int, int | None]:
        """Start a command without watching it. See `hutch.runtime.doors.Doors.launch`."""
        launched = await self._launch(exec_body(exec_id, command, **options))
        return launched.pid, launched.oom_kills

    async def _launch(self, body: ExecBody, *, unsure: bool = False) -> Launched:
        """``unsure``: it may have been started already."""

        async def attempt() -> Launched:
            nonlocal unsure
            try:
                return await self._http.call("POST", f"{self.path}/exec", Launched, body)
            except ConnectionFailed:
                unsure = True
                raise
            except InvalidStateError:
                if not unsure:
                    raise
                for execution in await self.executions():
                    if execution.id == body.id:  # an earlier attempt was carried out after all
                        return Launched(pid=execution.pid)
                raise ConnectionFailed(f"execution {body.id} of box {self.id} is still being started") from None

        launched: Launched = await self._http.repeat(attempt)
        return launched

    async def launch_main(self, rows: int, cols: int) -> None:
        """See `hutch.runtime.doors.Doors.launch_main`."""
        await self._post("start", StartBody(fresh=True, rows=rows, cols=cols))

    async def signal_execution(self, exec_id: str, signum: int) -> None:
        """See `hutch.runtime.doors.Doors.signal_execution`."""
        await self._post(f"executions/{quote(exec_id, safe='')}/signal", SignalBody(signal=signum))

    async def log_records(self) -> list[Record]:
        """What the log of the main command holds, oldest first."""
        return await self._http.get(f"{self.path}/log", list[Record])

    async def connect_relay(self, exec_id: str, watcher: str, oom_kills: int | None) -> RemoteLink:
        """Connect to the execution's relay, to be the relay before it."""
        return RemoteLink(await dial(self._http, self.id, exec_id, watcher, oom_kills))

    async def _post(self, verb: str, body: object = None) -> None:
        await self._http.call("POST", f"{self.path}/{verb}", object, body)


def exec_body(exec_id: str, command: tuple[str, ...], **options: Any) -> ExecBody:
    """What starts a command. Raises `InvalidArgumentError` for one that is too long."""
    env = options.pop("env", None)
    body = ExecBody(id=exec_id, command=command, env=dict(env or {}), **options)
    if len(dumps(body)) > MAX_PAYLOAD:
        raise InvalidArgumentError("the command with its environment is too long")
    return body
