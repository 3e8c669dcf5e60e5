"""Running a server in this process."""

from __future__ import annotations

import contextlib
import resource
import socket
from typing import TYPE_CHECKING

import uvicorn

from hutch.errors import ConfigError, NetworkError
from hutch.runtime.ports import listen_at
from hutch.runtime.runtime import LocalRuntime
from hutch.server.app import make_app
from hutch.server.wire import BoundedHttp, Limits, ReceiptedWebSocket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from starlette.types import ASGIApp

    from hutch.server.settings import ServerSettings
    from hutch.types import NetBounds

    # Told when the server listens: what stops it, and its URL.
    Started = Callable[["Server", str], object]


class Server(uvicorn.Server):
    """uvicorn, with the signals left to the caller."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # clients need not be waited for, but the records must be closed
            await self.lifespan.shutdown()

    def stop(self) -> None:
        """Stop in an orderly way; called again: without waiting for anybody."""
        self.force_exit = self.should_exit
        self.should_exit = True


async def serve_home(home: Path, settings: ServerSettings, host: str, port: int, started: Started) -> None:
    """Serve the boxes of a home until the server is stopped. Raises `ConfigError` when the address cannot be used."""
    with listen(host, port) as listener:
        async with LocalRuntime(home, bounds=bounds_beside(settings, listener)) as runtime:
            await run(make_app(runtime, settings), settings, listener, started)


def bounds_beside(settings: ServerSettings, listener: socket.socket) -> NetBounds:
    """What boxes may have of the network beside the server itself. Raises `ConfigError` when its own ports are among
    those for boxes (one of them could have such a port while the server is away), or their address is not here."""
    bounds = settings.bounds
    if bounds.publish_address:
        first, last = bounds.publish_ports
        for port in (listener.getsockname()[1], settings.tunnel_port):
            if first <= port <= last:
                raise ConfigError(
                    f"the ports {first}-{last} cannot be given to boxes: port {port} is the server's own; choose "
                    "another range with --publish-ports"
                )
        try:
            listen_at(bounds.publish_address, 0).close()
        except NetworkError as error:
            raise ConfigError(
                f"--publish-address {bounds.publish_address}: ports of boxes cannot be published there: {error}"
            ) from None
    return bounds


async def run(app: ASGIApp, settings: ServerSettings, listener: socket.socket, started: Started) -> None:
    """Serve an application on a listening socket until the server is stopped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * settings.max_connections + 1024  # tunnels, boxes and files have theirs
    if soft < wanted:  # boxes have limits of their own
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    server = make_server(app, settings)
    started(server, address(listener))
    await server.serve(sockets=[listener])


def make_server(app: ASGIApp, settings: ServerSettings) -> Server:
    """Return a server for the application; ``serve(sockets=[…])`` runs it."""
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        ws=ReceiptedWebSocket,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=settings.shutdown_seconds,
        ws_max_size=settings.max_frame_bytes,
        ws_ping_interval=settings.heartbeat_seconds,
        ws_ping_timeout=settings.silence_seconds,
        ws_per_message_deflate=False,
    )
    config.hutch_limits = Limits(  # type: ignore[attr-defined]  # travels with the configuration
        max_header_bytes=settings.max_header_bytes,
        header_seconds=settings.header_seconds,
        max_connections=settings.max_connections,
    )
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Bind and return the socket. Raises `ConfigError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"the address {host!r} cannot be used: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


def address(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
