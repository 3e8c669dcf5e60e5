"""Bytes from one socket to another and back, until both have said all.

One pipe serves all connections: bytes go through it from socket to socket within one turn of the event loop, without
being copied (splice(2)), and only what the other side does not take at once is kept by the connection. So a thousand
idle connections cost nothing, and a slow peer stops its own sender alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hutch.net.meter import Line, Meter

_PIPE_BYTES = 1 << 20
_SPLICE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_RESET, _END = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)


class Relay:
    """Joins two connected, non-blocking sockets, and closes both in the end."""

    def __init__(self, near: socket.socket, far: socket.socket, meter: Meter) -> None:
        """``near`` is the side of the box."""
        self._loop = asyncio.get_running_loop()
        self._sockets = (near, far)
        self._done = self._loop.create_future()
        self._open = 2
        self._ways = (_Way(self, near, far, meter.outward), _Way(self, far, near, meter.inward))
        for each in self._sockets:
            reset_at_close(each)

    async def run(self) -> None:
        """Pass on until both sides have ended, one broke off, or the task is cancelled."""
        for way in self._ways:
            way.resume()
        try:
            await self._done
        finally:
            for way in self._ways:
                way.stop()
            for each in self._sockets:
                each.close()

    def ended(self) -> None:
        """One way has come to its end."""
        self._open -= 1
        if not self._open and not self._done.done():
            for each in self._sockets:
                end_at_close(each)
            self._done.set_result(None)

    def broken(self) -> None:
        """A socket failed: both sides learn it as a reset."""
        if not self._done.done():
            self._done.set_result(None)


class _Way:
    """One direction."""

    def __init__(self, relay: Relay, source: socket.socket, target: socket.socket, line: Line) -> None:
        self._relay = relay
        self._loop = asyncio.get_running_loop()
        self._target = target
        # The event loop is given numbers: of a socket that it does not know yet it would make a (costly) description.
        self._source_fd, self._target_fd = source.fileno(), target.fileno()
        self._line = line
        self._pause: asyncio.TimerHandle | None = None
        self._rest = b""

    def resume(self) -> None:
        """Read on, when the box's limit allows."""
        if pause := self._line.pause():
            self._pause = self._loop.call_later(pause, self.resume)
        else:
            self._loop.add_reader(self._source_fd, self._read)

    def stop(self) -> None:
        """Do nothing any more."""
        for fd in (self._source_fd, self._target_fd):
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
        if self._pause is not None:
            self._pause.cancel()

    def _read(self) -> None:
        entrance, exit_ = _pipe()
        try:
            size = os.splice(self._source_fd, entrance, self._line.piece, flags=_SPLICE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._relay.broken()
            return
        if not size:
            self._loop.remove_reader(self._source_fd)
            with contextlib.suppress(OSError):
                self._target.shutdown(socket.SHUT_WR)
            self._relay.ended()
            return
        pause = self._line.count(size)
        left = size
        try:
            while left:
                left -= os.splice(exit_, self._target_fd, left, flags=_SPLICE)
        except (BlockingIOError, InterruptedError):
            self._rest = _drained(exit_, left)
            self._loop.remove_reader(self._source_fd)
            self._loop.add_writer(self._target_fd, self._write)
        except OSError:
            _drained(exit_, left)  # the next connection must not find it
            self._relay.broken()
        else:
            if pause:
                self._loop.remove_reader(self._source_fd)
                self.resume()

    def _write(self) -> None:
        try:
            self._rest = self._rest[self._target.send(self._rest) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._relay.broken()
            return
        if not self._rest:
            self._loop.remove_writer(self._target_fd)
            self.resume()


@functools.cache
def _pipe() -> tuple[int, int]:
    """Return the ends of the pipe: where bytes go in, and where they come out."""
    exit_, entrance = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    with contextlib.suppress(OSError):  # a limit on the user's pipes: it works as it is
        fcntl.fcntl(entrance, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return entrance, exit_


def _drained(exit_: int, size: int) -> bytes:
    pieces = []
    while size:
        pieces.append(os.read(exit_, size))
        size -= len(pieces[-1])
    return b"".join(pieces)


def reset_at_close(connection: socket.socket) -> None:
    """Let the peer see a reset, not an end, when the socket is closed; also because this process is killed, which must
    not look as if all had been said."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def end_at_close(connection: socket.socket) -> None:
    """Undo `reset_at_close`."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _END)


def tune(connection: socket.socket) -> None:
    """Send small pieces at once, and notice a peer that has vanished (within about two minutes)."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
