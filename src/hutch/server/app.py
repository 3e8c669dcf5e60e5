"""The application: all routes over one runtime."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from fastapi import FastAPI

from hutch import __version__
from hutch.server import (
    boxes,
    copies,
    envelope,
    executions,
    files,
    images,
    keeper,
    network,
    openapi,
    relay,
    system,
    volumes,
)
from hutch.server.edge import Edge
from hutch.server.idempotency import Idempotency
from hutch.server.rules import Activity, ClientRules
from hutch.server.service import Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hutch.sdk.base import Runtime
    from hutch.server.settings import ServerSettings

_DESCRIPTION = """\
Runs untrusted commands in isolated boxes.

Errors have one form: `{"error": {"message", "type", "code", "request_id"}}`; `code` is stable.

The output of an execution comes over a WebSocket: `GET /v1/boxes/{box_id}/executions/{execution_id}/attach`, or
`GET /v1/boxes/{box_id}/attach` for the main command of a box. Server to client: binary frames whose first byte is 1
(standard output) or 2 (standard error), and as the last frame the text `{"type": "exit", "exit_code": N}`. Client to
server: binary frames are standard input; the texts `{"type": "stdin_eof"}`, `{"type": "resize", "rows", "cols"}` and
`{"type": "signal", "sig"}`.

A tunnel leads to a port of a box: `POST /v1/boxes/{box_id}/network/tunnel?port=N` answers with a URI. Connect to its
authority and send `CONNECT authority HTTP/1.1`: after the answer 200 the connection is that of the port. An ordinary
HTTP request instead of it goes to the port as it is.

Under `/v1/x` is what our own SDK uses beyond that.
"""


def make_app(backend: Runtime, settings: ServerSettings) -> FastAPI:
    """Return the ASGI application that serves this runtime. It does not open or close it."""
    service = Service(backend, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running() as tasks:
            tasks.start_soon(keeper.keep, service)
            yield

    app = FastAPI(
        title="Hutch",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.service = service
    envelope.install(app)
    # The last one is the first that a request meets.
    app.add_middleware(Activity, service=service)
    app.add_middleware(Idempotency, seconds=settings.idempotency_seconds)
    app.add_middleware(Edge, settings=settings)
    for module in (system, copies, boxes, files, images, volumes, executions, network):
        app.include_router(module.router)
    app.router.routes.extend(executions.socket_routes())
    app.router.routes.extend(relay.routes(backend, ClientRules(service)))
    openapi.install(app)
    return app
