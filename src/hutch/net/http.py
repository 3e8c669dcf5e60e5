"""HTTP/1.1 between a box and peers that are admitted by name: each request is judged, not only the first.

Requests and responses are parsed and written anew, so there is nothing that the two sides could read differently.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

import anyio
import h11
import msgspec

from hutch.core import httphost
from hutch.errors import NetworkError
from hutch.net.link import Link

if TYPE_CHECKING:
    from collections.abc import Iterable

_HEAD_BYTES = 64 * 1024
IDLE_SECONDS = 300.0
"""How long a side may be silent while something is expected of it."""

_BODY_SECONDS = 1.0
_SWITCHING = 101
_UNDER_WAY = (h11.SEND_BODY, h11.SWITCHED_PROTOCOL, h11.ERROR)
# They concern one connection, not the message; h11 makes those that are needed.
_HOP_BY_HOP = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade", b"expect"))


class Refused(Exception):
    """A request that must not go on. The text is the reason."""


class Malformed(Refused):
    """What came is not HTTP, or not quite."""


class Peers(msgspec.Struct, frozen=True):
    """What an exchange needs of its door. ``open`` connects to a name, or raises `Refused` or `NetworkError`;
    ``rewrite`` may change a request on its way to a name."""

    open: Callable[[str], Awaitable[Link]]
    rewrite: Callable[[str, h11.Request], h11.Request]
    port: int


class Exchange:
    """Serves one connection of a box. ``requests``: how many came."""

    def __init__(self, box: Link, peers: Peers) -> None:
        self._box = box
        self._peers = peers
        self._server = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES)
        self._upstream: Link | None = None
        self._client = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES)
        self._name = ""
        self.requests = 0

    async def run(self) -> None:
        """Serve until an end; closes both sides. Raises `Refused` (the box was told)."""
        try:
            while await self._serve_one():
                pass
            with anyio.fail_after(IDLE_SECONDS):
                await self._box.end()
            self._box.close()
        except h11.ProtocolError as error:
            with contextlib.suppress(OSError):
                await self._deny(400, f"malformed HTTP: {error}", Malformed)
        except OSError:
            return  # a side has gone, and so does the other
        finally:
            if self._server.our_state in _UNDER_WAY:
                self._box.abort()  # it must not take what it got for all of it
            self._box.close()
            self._drop_upstream()

    async def _serve_one(self) -> bool:
        """Serve one request; returns whether another may follow."""
        request = await self._next(self._server, self._box)
        if not isinstance(request, h11.Request):
            return False
        self.requests += 1
        name = await self._judge(request)
        if self._upstream is None or name != self._name or not self._upstream.is_quiet():
            self._drop_upstream()
            try:
                self._upstream = await self._peers.open(name)
            except Refused as error:
                await self._deny(403, str(error))
            except NetworkError as error:
                await self._deny(502, f"{name}: {error}")
            self._client = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES)
            self._name = name
        assert self._upstream is not None
        return await self._exchange(self._upstream, self._peers.rewrite(name, request))

    async def _judge(self, request: h11.Request) -> str:
        names = [name for name, _ in request.headers]
        if b"content-length" in names and b"transfer-encoding" in names:
            await self._deny(400, "a request has either Content-Length or Transfer-Encoding")
        try:
            name, port = httphost.host(request)
        except ValueError as error:
            await self._deny(400, str(error))
        if port is not None and port != self._peers.port:
            await self._deny(403, f"Host names port {port}, and the connection is to port {self._peers.port}")
        return name

    async def _exchange(self, upstream: Link, request: h11.Request) -> bool:
        await self._write(self._client, upstream, _forwarded(request))
        body = asyncio.create_task(self._send_body(upstream))
        try:
            response = await self._answer(upstream)
            await self._write(self._server, self._box, response)
            if isinstance(response, h11.Response):
                await self._pass_on(self._client, upstream, self._server, self._box)
            await asyncio.wait([body], timeout=_BODY_SECONDS)  # the peer may have answered without waiting for it
        finally:
            body.cancel()
            await asyncio.wait([body])
        if isinstance(response, h11.InformationalResponse):
            await self._switch(upstream)
            return False
        if self._server.our_state is not h11.DONE or self._server.their_state is not h11.DONE:
            return False
        self._server.start_next_cycle()
        if self._client.our_state is h11.DONE and self._client.their_state is h11.DONE:
            self._client.start_next_cycle()
        else:
            self._drop_upstream()
        return True

    async def _send_body(self, upstream: Link) -> None:
        try:
            if self._server.they_are_waiting_for_100_continue:
                await self._write(self._server, self._box, h11.InformationalResponse(status_code=100, headers=[]))
            await self._pass_on(self._server, self._box, self._client, upstream)
        except (OSError, h11.ProtocolError):
            upstream.abort()  # it would wait for the rest

    async def _answer(self, upstream: Link) -> h11.Response | h11.InformationalResponse:
        """Return the response, or the consent to another protocol."""
        while True:
            try:
                event = await self._next(self._client, upstream)
            except OSError:
                event = None
            if isinstance(event, h11.Response):
                kept = [pair for pair in event.headers if pair[0] not in _HOP_BY_HOP]
                return h11.Response(status_code=event.status_code, headers=kept, reason=event.reason)
            if not isinstance(event, h11.InformationalResponse):
                await self._deny(502, "the peer gave no answer")
            elif event.status_code == _SWITCHING:
                return event

    async def _pass_on(self, reader: h11.Connection, source: Link, writer: h11.Connection, target: Link) -> None:
        event = None
        while not isinstance(event, h11.EndOfMessage):
            event = await self._next(reader, source)
            if not isinstance(event, (h11.Data, h11.EndOfMessage)):
                raise ConnectionError("the message was cut")
            await self._write(writer, target, event)

    async def _switch(self, upstream: Link) -> None:
        """Another protocol (WebSocket): bytes from here on."""
        for connection, target in ((self._server, upstream), (self._client, self._box)):
            if early := connection.trailing_data[0]:
                await target.send(early)
        other = asyncio.create_task(_pump(self._box, upstream))
        try:
            await _pump(upstream, self._box)
            await asyncio.wait([other])
        finally:
            other.cancel()

    async def _next(self, connection: h11.Connection, source: Link) -> object:
        try:
            while (event := connection.next_event()) is h11.NEED_DATA:
                with anyio.fail_after(IDLE_SECONDS):
                    connection.receive_data(await source.receive())
        except h11.RemoteProtocolError as error:
            if connection is self._server:
                raise
            raise ConnectionError(f"the peer's answer is cut, or malformed: {error}") from None
        return event

    async def _write(self, connection: h11.Connection, target: Link, event: h11.Event) -> None:
        if data := connection.send(event):
            with anyio.fail_after(IDLE_SECONDS):
                await target.send(data)

    async def _deny(self, status: int, reason: str, kind: type[Refused] = Refused) -> None:
        body = f"hutch: {reason}\n".encode()
        head = [("Content-Type", "text/plain"), ("Content-Length", str(len(body))), ("Connection", "close")]
        if self._server.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=status, headers=head, reason=HTTPStatus(status).phrase.encode()),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                await self._write(self._server, self._box, event)
        raise kind(reason)

    def _drop_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None


def _forwarded(request: h11.Request) -> h11.Request:
    headers = [pair for pair in request.headers if pair[0] not in _HOP_BY_HOP]
    if protocol := _wanted_protocol(request.headers):
        headers += [(b"connection", b"upgrade"), (b"upgrade", protocol)]
    return h11.Request(method=request.method, target=httphost.path(request.target), headers=headers)


def _wanted_protocol(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    tokens = {token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")}
    protocols = [value for name, value in headers if name == b"upgrade"]
    wanted = {token.strip().lower() for value in protocols for token in value.split(b",")}
    # Cleartext HTTP/2, also as one choice of several, would be requests that nobody judges.
    return protocols[0] if b"upgrade" in tokens and len(protocols) == 1 and b"h2c" not in wanted else b""


async def _pump(source: Link, target: Link) -> None:
    try:
        while data := await source.receive():
            await target.send(data)
        await target.end()
    except OSError:
        target.abort()
