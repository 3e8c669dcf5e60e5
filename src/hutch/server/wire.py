"""What is added to uvicorn's connections: bounds for slow and greedy clients, and receipts for what was sent.

A WebSocket application cannot send a Ping; but the Pong that answers one is the only receipt that every client gives
(RFC 6455, 5.5.3: a Pong says that all before its Ping has arrived). The socket's scope therefore has the extension
`hutch.receipts` with an object that offers `confirm`.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State

from hutch.errors import InvalidArgumentError, ResourceExhaustedError
from hutch.server.envelope import envelope

if TYPE_CHECKING:
    from collections.abc import Callable

    from uvicorn.config import Config

RECEIPTS = "hutch.receipts"
_MARK = b"hutch"
# Below this size copies cost less than a further call. (It must not be below 64 KiB: RFC 6455, 5.2, wants the shortest
# form of the length.)
_LARGE = 1 << 16
# A client that has answered none for so many seconds is taken for one that never does.
_PATIENCE = 5.0


async def overloaded(scope: Any, receive: Any, send: Any) -> None:
    """The application of a connection that is one too many."""
    error = ResourceExhaustedError("the server has as many connections as it takes; come again later")
    headers = {"retry-after": "1", "connection": "close"}
    await envelope(error, secrets.token_hex(8), headers=headers)(scope, receive, send)


class BoundedHttp(HttpToolsProtocol):
    """Limits the size of a request's head, and the time that it may take to come."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its base
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._arm()  # the head of another request on the same connection
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._head = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._disarm()
        if len(self.connections) > Limits.of(self.config).max_connections:
            self.app = overloaded
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        error = envelope(InvalidArgumentError(msg), secrets.token_hex(8))
        lines = [b"HTTP/1.1 400 Bad Request", b"connection: close"]
        lines += [name + b": " + value for name, value in error.raw_headers]
        self.transport.write(b"\r\n".join([*lines, b"", error.body]))
        self.transport.close()

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > Limits.of(self.config).max_header_bytes:
            raise ValueError("the head of the request is too large")  # the parser ends the connection with 400

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(Limits.of(self.config).header_seconds, self._expire)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        self.transport.abort()


class Limits:
    """The settings that the connections need; they travel with uvicorn's configuration."""

    def __init__(self, *, max_header_bytes: int, header_seconds: float, max_connections: int) -> None:
        self.max_header_bytes = max_header_bytes
        self.header_seconds = header_seconds
        self.max_connections = max_connections

    @staticmethod
    def of(config: Config) -> Limits:
        return config.hutch_limits  # type: ignore[attr-defined,no-any-return]  # put there by `serve`


class Receipts:
    """Asks the peer of one socket for receipts, with one Ping on its way at a time: the answers to two would get in
    each other's way (a peer's Nagle algorithm holds back the second until we have acknowledged the first)."""

    def __init__(self, send_ping: Callable[[bytes], None], loop: asyncio.AbstractEventLoop) -> None:
        self._send_ping = send_ping
        self._loop = loop
        self._number = 0
        # Who waits for the Pong that is due, and who for the one after it.
        self._due: asyncio.Future[None] | None = None
        self._next: asyncio.Future[None] | None = None
        # A peer that has answered once is waited for without a limit; the keep-alive ends dead ones.
        self._answers: bool | None = None
        self._waived = False
        self._lost = False

    async def confirm(self) -> bool:
        """Wait until the peer has received all that was sent before; false when the connection is lost.

        A peer that never answers a Ping is believed after a while.
        """
        if self._lost or self._waived or self._answers is False:
            return not self._lost
        if self._due is None:
            receipt = self._due = self._ping()
        else:
            receipt = self._next = self._next or self._loop.create_future()
        try:
            await asyncio.wait_for(asyncio.shield(receipt), None if self._answers else _PATIENCE)
        except TimeoutError:
            if self._answers:  # meanwhile, to an earlier one
                await asyncio.shield(receipt)
            else:
                self._answers = False
        return not self._lost

    async def alive(self, seconds: float) -> bool:
        """Whether the peer answers a Ping in time."""
        try:
            return await asyncio.wait_for(self.confirm(), seconds)
        except TimeoutError:
            return False

    def waive(self, on: bool) -> None:
        """Do not wait while the reading side is at a halt, so that no Pong can come."""
        self._waived = on
        if on:
            self._settle()

    def received(self, payload: bytes) -> None:
        """A Pong has come."""
        if payload != self._payload or self._due is None:
            return
        self._answers = True
        _resolve(self._due)
        self._due = None
        if self._next is not None:
            waiting, self._next = self._next, None
            self._due = self._ping(waiting)

    def lost(self) -> None:
        """The connection is gone."""
        self._lost = True
        self._settle()

    def _settle(self) -> None:
        for future in (self._due, self._next):
            if future is not None:
                _resolve(future)
        self._due = self._next = None

    def _ping(self, receipt: asyncio.Future[None] | None = None) -> asyncio.Future[None]:
        self._number += 1
        self._send_ping(self._payload)
        return receipt or self._loop.create_future()

    @property
    def _payload(self) -> bytes:
        return _MARK + struct.pack("!Q", self._number)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class ReceiptedWebSocket(WebSocketsSansIOProtocol):
    """Offers receipts, and keeps patience with a peer whose Pong waits unread behind what it sends to a command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.receipts = Receipts(self._ping, self.loop)
        if len(self.connections) >= Limits.of(self.config).max_connections:
            self.app = overloaded

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):
            self.scope["extensions"][RECEIPTS] = self.receipts  # type: ignore[assignment]  # it is ours

    async def send(self, message: Any) -> None:
        data = message.get("bytes")
        if data is not None and len(data) >= _LARGE and self.handshake_complete and not self.close_sent:
            await self._send_large(data)
            return
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True  # by a refusal; uvicorn would take it for a forgotten one

    async def _send_large(self, data: bytes | memoryview) -> None:
        """As its base does, without the five copies of the payload that are made there. Nothing is compressed."""
        await self.writable.wait()
        if self.disconnected or self.transport.is_closing() or self.conn.state is not State.OPEN:
            raise ClientDisconnected
        self.transport.write(struct.pack("!BBQ", 0x80 | Opcode.BINARY, 127, len(data)))
        self.transport.write(data)

    def send_receive_event_to_app(self) -> None:
        """As its base does, which fills the log with traces of text that is none."""
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.conn.send_close(1007)
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    def handle_pong(self, event: Frame) -> None:
        payload = bytes(event.data)
        self.receipts.received(payload)
        if payload.startswith(_MARK) and self.pending_ping_payload is not None:
            # It may stand for the keep-alive's own as well; in any case the peer lives.
            event = Frame(Opcode.PONG, self.pending_ping_payload)
        super().handle_pong(event)

    def keepalive_timeout(self) -> None:
        if self.read_paused and not self.queue.empty():
            self.pong_timer = self.loop.call_later(self.ping_timeout or 1.0, self.keepalive_timeout)
            return
        super().keepalive_timeout()
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.receipts.lost()
        super().connection_lost(exc)

    def _ping(self, payload: bytes) -> None:
        if self.close_sent or self.transport.is_closing():
            return
        self.conn.send_ping(payload)
        self.transport.write(b"".join(self.conn.data_to_send()))
