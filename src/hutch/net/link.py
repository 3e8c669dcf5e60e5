"""One end of a conversation that the gateway reads along: a socket, plain or under TLS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, Protocol

import anyio

if TYPE_CHECKING:
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

    def end(self) -> None:
        """Say that nothing more will be sent."""

    def close(self) -> None:
        """Close. Idempotent."""


class PlainLink:
    """A connected, non-blocking socket. ``line``: counts and limits what is received; ``beginning``: bytes that were
    read from it already."""

    def __init__(self, connection: socket.socket, line: Line | None = None, beginning: bytes = b"") -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = connection
        self._line = line
        self._beginning = beginning

    async def receive(self) -> bytes:
        """See `Link`."""
        data, self._beginning = self._beginning, b""
        if not data:
            data = await self._loop.sock_recv(
                self._socket, min(_READ_BYTES, self._line.piece if self._line else _READ_BYTES)
            )
        if self._line is not None and (pause := self._line.count(len(data))):
            await asyncio.sleep(pause)
        return data

    async def send(self, data: bytes) -> None:
        """See `Link`."""
        await self._loop.sock_sendall(self._socket, data)

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

    def end(self) -> None:
        """See `Link`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See `Link`."""
        self._socket.close()


class TlsLink:
    """TLS over another link. `handshake` comes first. Failures of TLS are `OSError` (`ssl.SSLError`)."""

    def __init__(self, below: Link, context: ssl.SSLContext, *, server_name: str | None = None) -> None:
        """``server_name``: that of the peer, where this is the client's side."""
        self._below = below
        self._sending = anyio.Lock(fast_acquire=True)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
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
            except ssl.SSLEOFError:  # an end that was not announced: the message above says whether it is complete
                return b""

    async def send(self, data: bytes) -> None:
        """See `Link`."""
        self._tls.write(data)
        await self._flush()

    def is_quiet(self) -> bool:
        """See `Link`. Records that are not data (tickets of a session) count as noise, which costs a connection."""
        return not self._tls.pending() and self._below.is_quiet()

    def end(self) -> None:
        """See `Link`. TLS ends in both directions at once, so this closes."""
        self.close()

    def close(self) -> None:
        """See `Link`."""
        self._below.close()

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
