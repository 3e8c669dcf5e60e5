"""Executions: start, look, signal, resize, kill, attach."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import unquote

from fastapi import APIRouter, Query, Response
from starlette.routing import WebSocketRoute

from hutch.errors import ExecError, HutchError, InvalidArgumentError, InvalidStateError
from hutch.server import views
from hutch.server.attach import EXECUTION_ID, SIGNALS, Attachment
from hutch.server.envelope import envelope, request_id
from hutch.server.http import ERRORS, PageDep, Segment, ServiceDep
from hutch.server.models import ExecList, ExecRequest, ExecStarted, ExecView, ResizeRequest, SignalRequest
from hutch.server.registry import MAIN
from hutch.server.rules import time_limit
from hutch.server.service import service_of

if TYPE_CHECKING:
    from starlette.routing import BaseRoute
    from starlette.websockets import WebSocket

    from hutch.server.registry import Entry

router = APIRouter(prefix="/v1/boxes/{box_id}", tags=["executions"], responses=ERRORS)


@router.post("/exec", status_code=201)
async def start_execution(box_id: Segment, body: ExecRequest, service: ServiceDep) -> ExecStarted:
    """Start a command; a box that was never started is started first. Attach to the execution to get its output,
    which the box keeps meanwhile."""
    box = await service.box_for_use(box_id)
    service.counters.commands += 1
    try:
        execution = await box.exec(
            body.command,
            *body.args,
            env=body.env,
            cwd=body.working_dir,
            user=body.user,
            tty=body.tty,
            rows=body.rows,
            cols=body.cols,
            stdin=True,
            timeout=time_limit(service.settings, "timeout_seconds", body.timeout_seconds),
        )
    except ExecError:
        service.counters.exec_errors += 1
        raise
    service.executions.add(box, execution.id, (body.command, *body.args), tty=body.tty)
    await execution.close()
    return ExecStarted(execution_id=execution.id)


@router.get("/executions")
async def list_executions(box_id: Segment, service: ServiceDep, page: PageDep) -> ExecList:
    """List the executions of a box that are known, oldest first."""
    box = await service.box(box_id)
    entries = page.of(await service.executions.of_box(box), lambda entry: (entry.started_at, entry.id))
    return ExecList(executions=[_view(entry) for entry in entries], next_page_token=page.next_token)


@router.get("/executions/{exec_id}")
async def get_execution(box_id: Segment, exec_id: Segment, service: ServiceDep) -> ExecView:
    """How an execution stands."""
    box = await service.box(box_id)
    return _view(await service.executions.find(box, exec_id))


@router.delete("/executions/{exec_id}", status_code=204)
async def kill_execution(box_id: Segment, exec_id: Segment, service: ServiceDep) -> Response:
    """End the command and its process group at once. Nothing happens when it has ended."""
    box = await service.box(box_id)
    entry = await service.executions.find(box, exec_id)
    if exec_id == MAIN:
        await box.stop(timeout=0.0)
        return Response(status_code=204)
    try:
        async with service.executions.control(box, entry) as execution:
            await execution.kill()
    except InvalidStateError:
        pass
    return Response(status_code=204)


@router.post("/executions/{exec_id}/signal", status_code=204)
async def signal_execution(box_id: Segment, exec_id: Segment, body: SignalRequest, service: ServiceDep) -> Response:
    """Send a signal to the command's process group."""
    box = await service.box(box_id)
    entry = await service.executions.find(box, exec_id)
    if body.signal not in SIGNALS:
        allowed = ", ".join(map(str, sorted(SIGNALS)))
        raise InvalidArgumentError(f"signal: {body.signal} is none of {allowed}; to kill, DELETE the execution")
    async with service.executions.control(box, entry) as execution:
        await execution.signal(body.signal)
    service.touch(box.id)
    return Response(status_code=204)


@router.post("/executions/{exec_id}/resize", status_code=204)
async def resize_execution(box_id: Segment, exec_id: Segment, body: ResizeRequest, service: ServiceDep) -> Response:
    """Set the size of the command's terminal."""
    box = await service.box(box_id)
    entry = await service.executions.find(box, exec_id)
    async with service.executions.control(box, entry) as execution:
        await execution.resize(body.rows, body.cols)
    service.touch(box.id)
    return Response(status_code=204)


_SOCKET: dict[str, Any] = {
    "status_code": 101,
    "response_class": Response,
    "responses": {
        101: {"description": "The socket is open", "headers": {EXECUTION_ID: {"schema": {"type": "string"}}}}
    },
}
_WatchOnly = Annotated[Literal["0", "1", "false", "true"], Query(description="0: only watch")]


@router.get("/executions/{exec_id}/attach", **_SOCKET)
async def attach_execution(box_id: Segment, exec_id: Segment, stdin: _WatchOnly = "1") -> None:
    """A WebSocket to a command: output comes, input goes. A plain request is refused."""
    raise InvalidArgumentError("this is a WebSocket; ask for an upgrade")


@router.get("/attach", **_SOCKET)
async def attach_main(box_id: Segment, stdin: _WatchOnly = "1") -> None:
    """A WebSocket to the main command of a box, which may not have been started yet. A plain request is refused."""
    raise InvalidArgumentError("this is a WebSocket; ask for an upgrade")


@router.get("/executions/{exec_id}/relay", **_SOCKET)
async def relay_execution(
    box_id: Segment, exec_id: Segment, watcher: str = "", oom_kills: Annotated[int | None, Query(ge=0)] = None
) -> None:
    """A WebSocket with the sub-protocol `hutch.agent.v1`, for our own SDK: positions, acknowledgements, credits. A
    plain request is refused."""
    raise InvalidArgumentError("this is a WebSocket; ask for an upgrade")


def socket_routes() -> list[BaseRoute]:
    """The sockets themselves, as against what is documented of them."""
    paths = ("/v1/boxes/{box_id}/executions/{exec_id}/attach", "/v1/boxes/{box_id}/attach")
    return [WebSocketRoute(path, _attach) for path in paths]


async def _attach(websocket: WebSocket) -> None:
    service = service_of(websocket)
    scope = websocket.scope
    try:
        box = await service.box_for_use(unquote(websocket.path_params["box_id"]), active=False)
        exec_id = unquote(websocket.path_params.get("exec_id", MAIN))
        entry = await service.executions.find(box, exec_id)
        read_only = websocket.query_params.get("stdin") in ("0", "false")
        client = Attachment(service, box, entry, read_only=read_only, scope=scope, send=websocket._send)
        await service.executions.claim(entry, client)
    except HutchError as error:
        await envelope(error, request_id(scope))(scope, websocket._receive, websocket._send)
        return
    await client.run(websocket._receive)


def _view(entry: Entry) -> ExecView:
    end = None if entry.owed else entry.end
    return ExecView(
        execution_id=entry.id,
        status=end.state.value if end else "running",
        exit_code=end.exit_code if end else None,
        command=entry.command,
        tty=entry.tty,
        attached=entry.client is not None,
        started_at=views.moment(entry.started_at),
        ended_at=views.moment(end.at) if end else None,
        duration_ms=max(0, int((end.at - entry.started_at) * 1000)) if end else None,
    )
