"""The application: all routes over one runtime."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

from fastapi import FastAPI

from hutch import __version__
from hutch.errors import HutchError
from hutch.server import boxes, copies, envelope, executions, extra, files, images, keeper, relay, system, volumes
from hutch.server.edge import Edge
from hutch.server.idempotency import Idempotency
from hutch.server.service import Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from hutch.sdk.base import Runtime
    from hutch.server.settings import ServerSettings

# Where our own client starts commands and watches them.
_USES = re.compile(r"/v1/(?:x/boxes/([^/]+)/exec|boxes/([^/]+)/executions/[^/]+/relay)\Z")

_DESCRIPTION = """\
Runs untrusted commands in isolated boxes.

Errors have one form: `{"error": {"message", "type", "code", "request_id"}}`; `code` is stable.

The output of an execution comes over a WebSocket: `GET /v1/boxes/{box_id}/executions/{execution_id}/attach`, or
`GET /v1/boxes/{box_id}/attach` for the main command of a box.
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
    app.add_middleware(Use, service=service)
    app.add_middleware(Idempotency, seconds=settings.idempotency_seconds)
    app.add_middleware(Edge, settings=settings)
    for module in (system, copies, boxes, files, images, volumes, executions):
        app.include_router(module.router)
    app.router.routes.extend(executions.socket_routes())
    app.router.routes.extend(relay.routes(backend))
    app.router.routes.extend(extra.routes(backend))
    return app


class Use:
    """ASGI middleware. What our own client does is activity as well, and starts a box that only the idle policy has
    stopped."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and (match := _USES.match(scope["path"])) is not None:
            key = match[1] or match[2]
            await self._use(key)
            if scope["type"] == "websocket":
                receive = self._using(key, receive)
        await self._app(scope, receive, send)

    def _using(self, key: str, receive: Receive) -> Receive:
        async def using() -> Message:
            message = await receive()
            if message.get("text") is not None:  # another command is to be started
                await self._use(key)
            return message

        return using

    async def _use(self, key: str) -> None:
        with contextlib.suppress(HutchError):  # it will be told by what was asked for
            await self._service.box_for_use(unquote(key))
