"""Connections from the host to TCP ports of a box: one at a time, or all that come to a port of the host.

A connection is an execution of the agent in the box (`FileOp.TUNNEL`), so it works for every engine and from afar, is
bounded by the same windows, and ends with the box.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from hutch.core import agentproto as proto
from hutch.errors import HutchError, NetworkError
from hutch.net.meter import Meter
from hutch.net.relay import end_at_close, reset_at_close, tune
from hutch.runtime.checks import check_text, check_whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from hutch.runtime.execution import LocalExecution
    from hutch.sdk.base import Tunnel

log = logging.getLogger("hutch.net")

_PIECE = 128 * 1024


class Host(Protocol):
    """A box, as far as its ports go."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str | None: ...

    @property
    def ports(self) -> BoxPorts: ...

    async def start_file_op(self, op: proto.FileOp, path: str, **options: Any) -> LocalExecution: ...

    async def dispose(self, execution: Any) -> None: ...


class BoxTunnel:
    """A connection to a port of a box. Implements `hutch.sdk.base.Tunnel`."""

    def __init__(self, box: Host, spawn: Callable[..., None]) -> None:
        """Not connected yet."""
        self._box = box
        self._spawn = spawn
        self._rest = b""
        # What the agent says about the connection: why there is none, or "." when it has ended well.
        self._words = b""
        self._told = anyio.Event()

    async def open(self, port: int, *, udp: bool = False) -> None:
        """Connect; to a UDP port: datagrams with their length (two bytes) in front. Raises `NetworkError` when nobody
        listens at the TCP port."""
        self._execution = await self._box.start_file_op(
            proto.FileOp.TUNNEL,
            f"udp:{port}" if udp else str(port),
            user="0",
            cwd="/",
            stdin=True,
            sinks={proto.STDERR: self._hear},
            linger=None,
        )
        try:
            self._chunks = aiter(self._execution.stdout)
            first = await anext(self._chunks, b"")
            if not first:
                await self._execution.wait()
                reason = self._words.decode(errors="replace").strip() or "the tunnel ended"
                raise NetworkError(f"port {port} of box {self._box.name or self._box.id} cannot be reached: {reason}")
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._box.dispose(self._execution)
            raise
        self._rest = first[1:]
        self._spawn(self._watch_end)

    async def _watch_end(self) -> None:
        with contextlib.suppress(HutchError):
            await self._execution.wait()
        self._told.set()

    def _hear(self, words: bytes) -> None:
        self._words += words
        self._told.set()

    async def send(self, data: bytes) -> None:
        """Send bytes, waiting while the peer does not read. Raises `NetworkError` when it has gone."""
        await self._execution.stdin.write(data)
        if self._execution.finished:
            raise NetworkError("the peer of the tunnel has gone")

    async def end(self) -> None:
        """Say that nothing more will be sent; what the peer says still arrives. Idempotent."""
        await self._execution.stdin.close()

    async def receive(self) -> bytes:
        """Return the next bytes, none at the end. Raises `NetworkError` when the connection broke."""
        data, self._rest = self._rest, b""
        data = data or await anext(self._chunks, b"")
        if not data:
            await self._told.wait()
            if self._words != b".":
                raise NetworkError("the connection to the box was broken")
        return data

    async def close(self) -> None:
        """Break the connection. Idempotent."""
        with anyio.CancelScope(shield=True):
            await self._box.dispose(self._execution)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class PortForward:
    """A port of the host that leads to a port of a box. Implements `hutch.sdk.base.Forward`."""

    def __init__(self, box: Host, listener: socket.socket, port: int) -> None:
        self.host_ip: str = listener.getsockname()[0]
        self.host_port: int = listener.getsockname()[1]
        self._box = box
        self._listener = listener
        self._port = port
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()

    async def serve(self) -> None:
        """Join the connections that come, until `close`."""
        try:
            with self._scope, self._listener:
                await serve_port(self._listener, self._box, self._port)
        finally:
            self._ended.set()

    async def close(self) -> None:
        """Take the port away and break its connections. Idempotent."""
        self._scope.cancel()
        await self._ended.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class BoxPorts:
    """The ports of one box. Implements `hutch.sdk.base.Ports`."""

    def __init__(self, box: Host, spawn: Callable[..., None]) -> None:
        self._box = box
        self._spawn = spawn

    async def connect(self, port: int) -> BoxTunnel:
        """Connect to a TCP port of the box, whatever its network policy. See `hutch.sdk.base.Ports.connect`."""
        check_whole("port", port, 1, 65535)
        tunnel = BoxTunnel(self._box, self._spawn)
        await tunnel.open(port)
        return tunnel

    async def connect_datagrams(self, port: int) -> BoxTunnel:
        """Return a tunnel to a UDP port of the box, which carries datagrams with their length (two bytes) in front."""
        tunnel = BoxTunnel(self._box, self._spawn)
        await tunnel.open(port, udp=True)
        return tunnel

    async def forward(self, port: int, *, host_port: int = 0, host_ip: str = "127.0.0.1") -> PortForward:
        """Let a port of the host lead to a port of the box. See `hutch.sdk.base.Ports.forward`."""
        check_whole("port", port, 1, 65535)
        check_whole("host_port", host_port, 0, 65535)
        forward = PortForward(self._box, listen_at(check_text("host_ip", host_ip), host_port), port)
        self._spawn(forward.serve)
        return forward


def listen_at(host_ip: str, host_port: int, protocol: str = "tcp") -> socket.socket:
    """Return a socket on the host that takes connections, or datagrams. Raises `NetworkError` when the port is
    taken."""
    family = socket.AF_INET6 if ":" in host_ip else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    try:
        listener.setblocking(False)
        if protocol == "tcp":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host_ip, host_port))
        if protocol == "tcp":
            listener.listen(1024)
    except (OSError, ValueError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise NetworkError(f"port {host_port} of {host_ip} cannot be had on the host: {reason}") from error
    except BaseException:
        listener.close()
        raise
    return listener


async def serve_port(listener: socket.socket, box: Host, port: int, meter: Meter | None = None) -> None:
    """Join every connection to the listener with one to the box's port, until cancelled. ``meter`` counts and limits
    them."""
    loop = asyncio.get_running_loop()
    meter = meter or Meter()
    async with anyio.create_task_group() as tasks:
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("port %s of box %s: %s", port, box.id, error)
                await anyio.sleep(0.05)  # too many open files, mostly: they come back when connections end
                continue
            tasks.start_soon(_serve_connection, connection, box, port, meter)


async def _serve_connection(connection: socket.socket, box: Host, port: int, meter: Meter) -> None:
    with connection:
        try:
            tune(connection)
            reset_at_close(connection)
            meter.connections += 1
            async with await box.ports.connect(port) as tunnel:
                await join(connection, tunnel, meter)
            end_at_close(connection)
        except (HutchError, OSError) as error:
            log.debug("a connection to port %s of box %s ended: %s", port, box.id, error)


async def join(connection: socket.socket, tunnel: Tunnel, meter: Meter | None = None) -> None:
    """Carry bytes both ways, each until its end. Raises `NetworkError` or `OSError` when the connection breaks."""
    meter = meter or Meter()
    loop = asyncio.get_running_loop()

    async def outward() -> None:
        while data := await tunnel.receive():
            await loop.sock_sendall(connection, data)
            await asyncio.sleep(meter.outward.count(len(data)))
        connection.shutdown(socket.SHUT_WR)

    async def inward() -> None:
        while data := await loop.sock_recv(connection, min(_PIECE, meter.inward.piece)):
            await tunnel.send(data)
            await asyncio.sleep(meter.inward.count(len(data)))
        await tunnel.end()

    ways = [asyncio.ensure_future(outward()), asyncio.ensure_future(inward())]
    try:
        done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
        for way in done:
            way.result()
    finally:
        for way in ways:
            way.cancel()
        await asyncio.wait(ways)
