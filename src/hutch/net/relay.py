"""Bytes from one socket to another and back, until both have said all.

One buffer serves all connections: it is used within one turn of the event loop, and only what the other side does not
take at once is kept by the connection. So a thousand idle connections cost nothing, and a slow peer stops its own
sender alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_BUFFER = memoryview(bytearray(256 * 1024))
_RESET = struct.pack("ii", 1, 0)


class Relay:
    """Joins two connected, non-blocking sockets, and closes both in the end."""

    def __init__(
        self,
        near: socket.socket,
        far: socket.socket,
        *,
        sent: Callable[[int], None],
        received: Callable[[int], None],
    ) -> None:
        """``sent`` is told the numbers of bytes that go from near to far, ``received`` those of the other way."""
        self._loop = asyncio.get_running_loop()
        self._sockets = (near, far)
        self._done = self._loop.create_future()
        self._open = 2
        self._ways = (_Way(self, near, far, sent), _Way(self, far, near, received))

    async def run(self) -> None:
        """Pass on until both sides have ended, one broke off, or the task is cancelled."""
        for way in self._ways:
            way.resume()
        try:
            await self._done
        except BaseException:
            for each in self._sockets:
                reset_at_close(each)
            raise
        finally:
            for each in self._sockets:
                self._loop.remove_reader(each)
                self._loop.remove_writer(each)
                each.close()

    def ended(self) -> None:
        """One way has come to its end."""
        self._open -= 1
        if not self._open and not self._done.done():
            self._done.set_result(None)

    def broken(self) -> None:
        """A socket failed: both sides learn it as a reset."""
        if not self._done.done():
            for each in self._sockets:
                reset_at_close(each)
            self._done.set_result(None)


class _Way:
    """One direction."""

    def __init__(
        self, relay: Relay, source: socket.socket, target: socket.socket, count: Callable[[int], None]
    ) -> None:
        self._relay = relay
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._target = target
        self._count = count
        self._rest = b""

    def resume(self) -> None:
        """Read on."""
        self._loop.add_reader(self._source, self._read)

    def _read(self) -> None:
        try:
            size = self._source.recv_into(_BUFFER)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._relay.broken()
            return
        if not size:
            self._loop.remove_reader(self._source)
            with contextlib.suppress(OSError):
                self._target.shutdown(socket.SHUT_WR)
            self._relay.ended()
            return
        self._count(size)
        taken = self._send(_BUFFER[:size])
        if 0 <= taken < size:
            self._rest = bytes(_BUFFER[taken:size])
            self._loop.remove_reader(self._source)
            self._loop.add_writer(self._target, self._write)

    def _write(self) -> None:
        taken = self._send(memoryview(self._rest))
        if taken < 0:
            return
        self._rest = self._rest[taken:]
        if not self._rest:
            self._loop.remove_writer(self._target)
            self.resume()

    def _send(self, data: memoryview) -> int:
        """Return how much was taken, -1 when the connection is broken."""
        try:
            return self._target.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._relay.broken()
            return -1


def reset_at_close(connection: socket.socket) -> None:
    """Let the peer see a reset, not an end, when the socket is closed."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def tune(connection: socket.socket) -> None:
    """Send small pieces at once, and notice a peer that has vanished (within about two minutes)."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
