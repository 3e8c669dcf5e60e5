"""The door of a runner: one token, compared in constant time."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from hutch.errors import UnauthenticatedError
from hutch.server.envelope import envelope, request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class Guard:
    """ASGI middleware: lets through what carries the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = UnauthenticatedError("the token is missing or not accepted")
                await envelope(error, request_id(scope))(scope, receive, send)
                return
        await self._app(scope, receive, send)
