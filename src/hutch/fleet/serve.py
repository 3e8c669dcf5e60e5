"""The processes of a fleet. Each listens first, says where on standard output, and then runs until it is told to
stop."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import anyio

from hutch.fleet.api import with_door
from hutch.fleet.runner import make_app, report
from hutch.fleet.runtime import FleetRuntime
from hutch.runtime.home import default_home
from hutch.runtime.runtime import LocalRuntime
from hutch.server.app import make_app as make_public_app
from hutch.server.serve import listen, make_server
from hutch.server.settings import ServerSettings

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from pathlib import Path

    from starlette.types import ASGIApp

    from hutch.server.serve import Server


async def serve_api(
    *, database: Path, join_token: str, host: str, port: int, api_keys: Sequence[str] = (), **settings: Any
) -> None:
    """Serve the public interface over runners that join with the token. ``settings``: more of `ServerSettings`."""
    chosen = ServerSettings(state=database.with_name(database.name + ".d"), api_keys=tuple(api_keys), **settings)
    with listen(host, port) as sock:
        async with FleetRuntime(database) as fleet:
            await run(with_door(make_public_app(fleet, chosen), fleet, join_token), chosen, sock, "API")


async def serve_runner(
    *, join: str, token: str, home: Path | None, host: str, port: int, public_url: str | None
) -> None:
    """Serve a home's boxes to the API at ``join``. ``public_url``: how the API reaches us, if not by host and port."""
    root = home or default_home()
    with listen(host, port) as sock:
        async with LocalRuntime(root) as runtime, anyio.create_task_group() as tasks:
            tasks.start_soon(report, runtime, join, token, public_url or address(sock))
            await run(make_app(runtime), ServerSettings(state=root / "server"), sock, "runner")
            tasks.cancel_scope.cancel()


async def run(app: ASGIApp, settings: ServerSettings, sock: socket.socket, what: str) -> None:
    """Run an application on a listening socket until SIGINT or SIGTERM."""
    server = make_server(app, settings)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_stop_on_signal, server)
        print(f"Hutch {what} serves on {address(sock)}", flush=True)
        await server.serve(sockets=[sock])
        tasks.cancel_scope.cancel()


def address(sock: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _stop_on_signal(server: Server) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            server.stop()
