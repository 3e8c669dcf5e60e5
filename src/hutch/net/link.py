"""One end of a conversation that the gateway reads along: a socket, plain or under TLS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, Protocol

import anyio

from hutch.net.relay import end_at_close, reset_at_close

if TYPE_CHECKING:
    from collections.abc import Callable

    from hutch.net.meter import Line

_READ_BYTES = 128 * 1024


class Link(Protocol):
    """Bytes in both directions. All methods raise `OSError` for a connection that broke."""

    async def receive(self) -> bytes:
        """Return the next bytes, none at the end."""

    async def send(self, data: bytes) -> None:
        """Send all of it."""

    def is_quiet(self) -> bool:
        """Whether nothing is there to be received, not even the end."""

    async def end(self) -> None:
        """Say that nothing more will be sent."""

    def close(self) -> None:
        """Close; who waits for the other side gets an `OSError`. Idempotent."""

    def abort(self) -> None:
        """Close so that the other side sees that this was not the end."""


class PlainLink:
    """A connected, non-blocking socket. ``line``: counts and limits what is received; ``beginning``: bytes that were
    read from it already."""

    def __init__(self, connection: socket.socket, line: Line | None = None, beginning: bytes = b"") -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = connection
        self._line = line
        self._beginning = beginning
        self._waiters: set[asyncio.Future[None]] = set()
        reset_at_close(connection)

    async def receive(self) -> bytes:
        """See `Link`."""
        data, self._beginning = self._beginning, b""
        if not data:
            data = await self._read(min(_READ_BYTES, self._line.piece if self._line else _READ_BYTES))
        if self._line is not None and (pause := self._line.count(len(data))):
            await asyncio.sleep(pause)
        return data

    async def send(self, data: bytes) -> None:
        """See `Link`."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                await self._wait(self._loop.add_writer, self._loop.remove_writer)

    def is_quiet(self) -> bool:
        """See `Link`."""
        if self._beginning:
            return False
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    async def end(self) -> None:
        """See `Link`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See `Link`."""
        end_at_close(self._socket)
        self.abort()

    def abort(self) -> None:
        """See `Link`."""
        if (fd := self._socket.fileno()) < 0:
            return
        # The next connection may have the same number: the loop must not know it any more, nor anybody wait for it.
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)
        self._socket.close()
        for waiter in self._waiters:
            _wake(waiter)

    async def _read(self, size: int) -> bytes:
        while True:
            try:
                return self._socket.recv(size)
            except BlockingIOError:
                await self._wait(self._loop.add_reader, self._loop.remove_reader)

    async def _wait(self, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        """Wait until the socket can be read from, or written to."""
        fd = self._socket.fileno()
        waiter = self._loop.create_future()
        self._waiters.add(waiter)
        add(fd, _wake, waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
            if self._socket.fileno() == fd:
                remove(fd)
        if self._socket.fileno() < 0:
            raise ConnectionAbortedError("it was closed on this side")


class TlsLink:
    """TLS over another link. `handshake` comes first. Failures of TLS are `OSError` (`ssl.SSLError`), and so is an end
    that was not announced: anybody on the way can make one."""

    def __init__(self, below: Link, context: ssl.SSLContext, *, server_name: str | None = None) -> None:
        """``server_name``: that of the peer, where this is the client's side."""
        self._below = below
        self._sending = anyio.Lock(fast_acquire=True)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # which some versions of Python set
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )

    @property
    def protocol(self) -> str:
        """The protocol that both sides have agreed on (ALPN); empty: none."""
        return self._tls.selected_alpn_protocol() or ""

    async def handshake(self) -> None:
        """Agree with the other side."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush()
                await self._feed()
        await self._flush()

    async def receive(self) -> bytes:
        """See `Link`."""
        while True:
            try:
                return self._tls.read(_READ_BYTES)
            except ssl.SSLWantReadError:
                if not self._sending.locked():  # or else it goes with the rest; a reader must not wait for that
                    await self._flush()
                await self._feed()
            except ssl.SSLZeroReturnError:
                return b""

    async def send(self, data: bytes) -> None:
        """See `Link`."""
        self._tls.write(data)
        await self._flush()

    def is_quiet(self) -> bool:
        """See `Link`. Records that are not data (tickets of a session) count as noise, which costs a connection."""
        return not self._tls.pending() and self._below.is_quiet()

    async def end(self) -> None:
        """See `Link`. What the other side has sent meanwhile may be lost."""
        with contextlib.suppress(ssl.SSLError):  # the other side has not ended yet
            self._tls.unwrap()
        await self._flush()
        await self._below.end()

    def close(self) -> None:
        """See `Link`."""
        self._below.close()

    def abort(self) -> None:
        """See `Link`."""
        self._below.abort()

    async def _flush(self) -> None:
        """Send what there is, one after the other: whoever sends while another does waits for its turn."""
        async with self._sending:
            while data := self._outgoing.read():
                await self._below.send(data)

    async def _feed(self) -> None:
        data = await self._below.receive()
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
