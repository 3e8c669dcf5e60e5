"""Tunnels for those who have no SDK of ours: addresses of the server that lead to a port of a box (docs/server.md).

A client asks for one by HTTP and gets a URI. Whoever connects to its authority sends ``CONNECT`` and has a stream of
bytes from there on, or an ordinary HTTP request, which is passed on as it is. Such a connection carries no key, so the
authority has to be one: a name that nobody can guess (with ``tunnel_url``), or else a port of the server that serves
only the address that asked for it. An ASGI server knows no ``CONNECT``, hence listeners of our own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import socket
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import msgspec

from hutch.errors import (
    DeadlineError,
    HutchError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
)
from hutch.net.relay import reset_at_close, tune
from hutch.runtime.ports import join, listen_at
from hutch.types import BoxState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from anyio.abc import TaskGroup

    from hutch.sdk.base import Box, Runtime
    from hutch.server.settings import ServerSettings
    from hutch.types import BoxInfo

log = logging.getLogger("hutch.server")

_MOST_LEASES = 1024
_MOST_PEERS = 64
_HEAD_BYTES = 16 << 10
_FAREWELL_SECONDS = 1.0
_HOST = re.compile(r"[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,64}\]")
_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class Place(msgspec.Struct, frozen=True):
    """Where a client reached the server: the address of ours, what it calls us (without a port), and its own
    address."""

    address: str
    host: str
    peer: str


class Lease:
    """The right to reach one port of one box, as long as it runs. ``life`` is when it was started."""

    def __init__(self, box_id: str, port: int, life: float | None, uri: str) -> None:
        self.box_id = box_id
        self.port = port
        self.life = life
        self.uri = uri
        self.host = (urlsplit(uri).hostname or "").lower()
        self.at = time.time()
        # Who may come, where the authority is no secret; the latest last.
        self.peers: dict[str, None] = {}
        self.connections = 0
        self._scopes: set[anyio.CancelScope] = set()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Do something that ends with the lease."""
        with anyio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)

    def end(self) -> None:
        """Break all connections."""
        for scope in list(self._scopes):
            scope.cancel()


class Request(msgspec.Struct, frozen=True):
    """The beginning of a connection: what it wants, from which host, and all that came with it. ``rest`` is what came
    behind the head."""

    connect: bool
    host: str
    data: bytes
    rest: bytes


class Tunnels:
    """All leases of a server. ``is_open`` tells of a box whether strangers may come too; ``used`` is told of a box to
    which a connection is made."""

    def __init__(
        self, backend: Runtime, settings: ServerSettings, is_open: Callable[[str], bool], used: Callable[[str], None]
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._is_open = is_open
        self._used = used
        self._leases: dict[tuple[str, int], Lease] = {}
        self._by_host: dict[str, Lease] = {}
        self._connections = 0

    def start(self, tasks: TaskGroup) -> None:
        """Work in this task group. Raises `NetworkError` when the address for tunnels cannot be had."""
        self._tasks = tasks
        if self._settings.tunnel_url:
            listener = listen_at(self._settings.tunnel_host, self._settings.tunnel_port)
            tasks.start_soon(self._accept, listener, None)

    def grant(self, info: BoxInfo, port: int, place: Place) -> Lease:
        """Return the lease of a port of a running box, a new one if there is none. Raises `NetworkError` and
        `ResourceExhaustedError`."""
        lease = self._leases.get((info.id, port))
        if lease is not None and lease.life != info.started_at:
            self._drop(lease)
            lease = None
        if lease is None:
            if len(self._leases) >= _MOST_LEASES:
                raise ResourceExhaustedError(f"the server has {_MOST_LEASES} tunnels already; revoke some")
            lease = self._by_name(info, port) if self._settings.tunnel_url else self._by_port(info, port, place)
            self._leases[info.id, port] = lease
        lease.peers.pop(place.peer, None)
        lease.peers[place.peer] = None
        if len(lease.peers) > _MOST_PEERS:
            del lease.peers[next(iter(lease.peers))]
        return lease

    def of(self, box_id: str) -> list[Lease]:
        """The leases of a box."""
        return [lease for lease in self._leases.values() if lease.box_id == box_id]

    def revoke(self, box_id: str, port: int | None = None) -> None:
        """End the lease of a port of a box, or all that it has, and their connections. Idempotent."""
        for lease in self.of(box_id):
            if port in (None, lease.port):
                self._drop(lease)

    def sweep(self, infos: Mapping[str, BoxInfo]) -> None:
        """End the leases of boxes that are not among these any more, or do not live the life that a lease is for."""
        for lease in list(self._leases.values()):
            info = infos.get(lease.box_id)
            if info is None or not (info.state is BoxState.UNKNOWN or _lives(info, lease)):
                self._drop(lease)

    # Private methods.

    def _by_name(self, info: BoxInfo, port: int) -> Lease:
        scheme, _, authority = self._settings.tunnel_url.rstrip("/").partition("://")
        lease = Lease(info.id, port, info.started_at, f"{scheme}://{secrets.token_hex(16)}.{authority}/")
        self._by_host[lease.host] = lease
        return lease

    def _by_port(self, info: BoxInfo, port: int, place: Place) -> Lease:
        listener = listen_at(place.address, 0)
        address = f"[{place.address}]" if ":" in place.address else place.address
        host = place.host if _HOST.fullmatch(place.host) else address
        lease = Lease(info.id, port, info.started_at, f"http://{host}:{listener.getsockname()[1]}/")
        self._tasks.start_soon(self._accept, listener, lease)
        return lease

    def _drop(self, lease: Lease) -> None:
        if self._leases.get((lease.box_id, lease.port)) is lease:
            del self._leases[lease.box_id, lease.port]
        self._by_host.pop(lease.host, None)
        lease.end()

    async def _accept(self, listener: socket.socket, lease: Lease | None) -> None:
        """Serve the connections to a listener, which is the lease's own or that of all."""
        loop = asyncio.get_running_loop()
        with listener, contextlib.nullcontext() if lease is None else lease.holding():
            while True:
                try:
                    connection, address = await loop.sock_accept(listener)
                except OSError as error:
                    log.warning("tunnels: %s", error)
                    await anyio.sleep(0.05)  # too many open files, mostly: they come back when connections end
                    continue
                self._tasks.start_soon(self._serve, connection, address[0], lease)

    async def _serve(self, connection: socket.socket, peer: str, lease: Lease | None) -> None:
        self._connections += 1
        try:
            with connection:
                try:
                    tune(connection)
                    if self._connections > self._settings.max_connections:
                        raise ResourceExhaustedError("the server has as many tunnels open as it takes; come later")
                    request = await self._request(connection)
                    lease = self._admit(lease, request, peer)
                    with lease.holding():
                        await self._carry(connection, lease, request)
                        return
                    reset_at_close(connection)  # the lease has ended
                except HutchError as error:
                    await _refuse(connection, error)
        except OSError as error:
            log.debug("a tunnel ended: %s", error)
        except Exception:  # one connection must not take the others with it
            log.exception("a tunnel failed")
        finally:
            self._connections -= 1

    async def _request(self, connection: socket.socket) -> Request:
        loop = asyncio.get_running_loop()
        data = b""
        with anyio.move_on_after(self._settings.header_seconds):
            while b"\r\n\r\n" not in data:
                piece = await loop.sock_recv(connection, _HEAD_BYTES)
                data += piece
                if not piece or len(data) > _HEAD_BYTES:
                    raise InvalidArgumentError("what came is not the head of an HTTP request")
            return _parse(data)
        raise DeadlineError("the head of the request did not come in time")

    def _admit(self, lease: Lease | None, request: Request, peer: str) -> Lease:
        if lease is None:
            lease = self._by_host.get(request.host)
            if lease is None:
                raise NotFoundError("there is no such tunnel, or it was revoked; ask for a new one")
        elif not (request.connect or request.host == lease.host):
            # A name that someone has pointed here, so that a page of his in a browser may read what the box says.
            raise PermissionDeniedError("the request names another host than the tunnel has")
        elif peer not in lease.peers and not self._is_open(lease.box_id):
            raise PermissionDeniedError("the tunnel is for those who asked for it; ask for it from this address too")
        return lease

    async def _carry(self, connection: socket.socket, lease: Lease, request: Request) -> None:
        box = await self._box(lease)
        self._used(box.id)
        async with await box.ports.connect(lease.port) as tunnel:
            lease.connections += 1
            try:
                if request.connect:
                    await asyncio.get_running_loop().sock_sendall(connection, _ESTABLISHED)
                first = request.rest if request.connect else request.data
                try:
                    if first:
                        await tunnel.send(first)
                    await join(connection, tunnel)
                except HutchError as error:  # too late for an answer
                    log.debug("a tunnel to port %s of box %s ended: %s", lease.port, lease.box_id, error)
                    reset_at_close(connection)
            finally:
                lease.connections -= 1

    async def _box(self, lease: Lease) -> Box:
        """The box of a lease, which still lives the life that it had."""
        try:
            box = await self._backend.get(lease.box_id)
            info = await box.info()
        except NotFoundError:
            info = None
        if info is None or not _lives(info, lease):
            self._drop(lease)
            raise NotFoundError("the box of the tunnel has ended; ask for a new one")
        return box


def _lives(info: BoxInfo, lease: Lease) -> bool:
    return info.state in (BoxState.RUNNING, BoxState.PAUSED) and info.started_at == lease.life


def _parse(data: bytes) -> Request:
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise InvalidArgumentError("what came is not the head of an HTTP request")
    hosts = [value for name, _, value in (line.partition(":") for line in lines) if name.lower() == "host"]
    if len(hosts) != 1:
        raise InvalidArgumentError("the request does not name one host")
    connect = words[0] == "CONNECT"
    authority = words[1] if connect else hosts[0].strip()
    try:
        host = urlsplit(f"//{authority}").hostname
    except ValueError:
        host = None
    if not host:
        raise InvalidArgumentError("the host that the request names is none")
    return Request(connect, host.lower(), data, rest)


async def _refuse(connection: socket.socket, error: HutchError) -> None:
    """Answer with the error. Clients show the body as it is."""
    body = error.message.encode()
    head = (
        f"HTTP/1.1 {error.status} Refused\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    with anyio.move_on_after(_FAREWELL_SECONDS):
        await loop.sock_sendall(connection, head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(connection, _HEAD_BYTES):  # what is unread would reset the answer away
            pass
