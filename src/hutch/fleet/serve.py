"""The processes of a fleet. Each listens first, says where on standard output, and then runs until it is told to
stop."""

from __future__ import annotations

import logging
import secrets
import socket
from typing import TYPE_CHECKING

import anyio
import uvicorn

from hutch.core.relay import MAX_MESSAGE
from hutch.fleet.runner import make_app, report
from hutch.runtime.runtime import LocalRuntime

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.types import ASGIApp

_GRACE_SECONDS = 5


async def serve_runner(
    *, join: str, token: str, home: Path | str | None, host: str, port: int, public_url: str | None
) -> None:
    """Serve a home's boxes to the API at ``join``. ``public_url``: how the API reaches us, if not by host and port."""
    with listen(host, port) as sock:
        url = public_url or address(sock)
        own_token = secrets.token_urlsafe(32)
        async with LocalRuntime(home) as runtime, anyio.create_task_group() as tasks:
            tasks.start_soon(report, runtime, join, token, url, own_token)
            await run(make_app(runtime, own_token), sock, "runner")
            tasks.cancel_scope.cancel()


def listen(host: str, port: int) -> socket.socket:
    """Open the port, so that whoever connects from now on is served."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, port), family=family, backlog=2048)
    # Inherited by what is accepted; asyncio sets it only where the socket names its protocol.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def address(sock: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def run(app: ASGIApp, sock: socket.socket, what: str) -> None:
    """Run an application on a listening socket until SIGINT or SIGTERM."""
    config = uvicorn.Config(
        app,
        log_level=logging.WARNING,
        access_log=False,
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE,
        ws_per_message_deflate=False,
        timeout_keep_alive=120,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        lifespan="off",
    )
    print(f"hutch {what} at {address(sock)}", flush=True)
    await uvicorn.Server(config).serve(sockets=[sock])
