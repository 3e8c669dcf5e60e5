"""A WebSocket to a server: sans-IO `websockets` on an asyncio transport. Messages are handed over as they come; what is
sent is buffered by the transport."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING

import anyio
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import State
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from hutch.core.relay import MAX_MESSAGE, SUBPROTOCOL
from hutch.sdk.remote_http import ConnectionFailed
from hutch.sdk.remote_inlet import Inlet
from hutch.sdk.remote_wire import error_from

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_DIAL_SECONDS = 10.0
_DATA = frozenset({Opcode.BINARY, Opcode.TEXT, Opcode.CONT})
_quiet = logging.Logger("hutch.websocket", logging.CRITICAL)


class WebSocket(asyncio.BufferedProtocol):
    """Made by `dial`. ``on_message`` gets each message, ``on_lost`` is called once at the end, unless we closed it."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._url = url
        self._protocol = ClientProtocol(
            parse_uri(url), subprotocols=[Subprotocol(SUBPROTOCOL)], max_size=MAX_MESSAGE, logger=_quiet
        )
        self._headers = headers
        self._inlet = Inlet()
        self._transport: asyncio.Transport | None = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gone = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._fragments: list[bytes | bytearray] = []
        self._is_text = False
        self.closed = False
        self.on_message: Callable[[bytes | bytearray | str], None] = lambda message: None
        self.on_lost: Callable[[], None] = lambda: None

    @classmethod
    async def dial(cls, url: str, headers: Mapping[str, str]) -> WebSocket:
        """Connect. ``url`` is that of the HTTP scheme. Raises what the server answers instead, or
        `ConnectionFailed`."""
        this = cls("ws" + url.removeprefix("http"), headers)
        uri = this._protocol.uri
        dialled = False
        try:
            with anyio.fail_after(_DIAL_SECONDS):
                await asyncio.get_running_loop().create_connection(
                    lambda: this, uri.host, uri.port, ssl=True if uri.secure else None
                )
                await this._opened
            dialled = True
        except (OSError, TimeoutError) as error:
            raise ConnectionFailed(f"{url} does not answer: {error or 'no answer in time'}") from None
        except InvalidStatus as error:
            raise error_from(error.response.status_code, bytes(error.response.body or b"")) from None
        except InvalidHandshake as error:
            raise ConnectionFailed(f"{url} answered what is no WebSocket handshake: {error}") from None
        finally:
            if not dialled:
                this.close()
        return this

    def send(self, message: bytes | str) -> None:
        """Send one message."""
        if not self.closed and self._protocol.state is State.OPEN:
            if isinstance(message, str):
                self._protocol.send_text(message.encode())
            else:
                self._protocol.send_binary(message)
            self._flush()

    async def drain(self) -> None:
        """Wait until little enough waits to be sent."""
        await self._writable.wait()

    def pause(self) -> None:
        """Take nothing more for now."""
        if self._transport is not None and not self.closed:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Take messages again."""
        if self._transport is not None and not self.closed:
            self._transport.resume_reading()

    def close(self) -> None:
        """Close, without waiting for the other side. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._writable.set()
        if self._transport is not None:
            if self._protocol.state is State.OPEN:
                self._protocol.send_close(1000)
                self._flush()
            self._transport.close()

    async def finish(self, seconds: float) -> None:
        """Close, and wait until what was sent is gone, at most so long; then it is thrown away."""
        self.close()
        if self._transport is not None:
            with anyio.move_on_after(seconds):
                await self._gone.wait()
            self._transport.abort()
            await self._gone.wait()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        with contextlib.suppress(OSError):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = self._protocol.connect()
        for name, value in self._headers.items():
            request.headers[name] = value
        self._protocol.send_request(request)
        self._flush()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._inlet.room()

    def buffer_updated(self, nbytes: int) -> None:
        for part in self._inlet.received(nbytes):
            if isinstance(part, bytes):
                self._take(part)
            elif not self.closed and self._protocol.state is State.OPEN:
                self.on_message(part)

    def eof_received(self) -> None:
        self._protocol.receive_eof()
        self._events()

    def connection_lost(self, error: Exception | None) -> None:
        self._gone.set()
        if not self._opened.done():
            self._opened.set_exception(self._protocol.handshake_exc or error or ConnectionResetError("connection lost"))
            self._opened.exception()
        self._writable.set()
        if not self.closed:
            self.closed = True
            self.on_lost()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # Private methods.

    def _take(self, data: bytes) -> None:
        opening = self._protocol.state is State.CONNECTING
        self._protocol.receive_data(data)
        self._events()
        if opening and self._protocol.state is State.OPEN and data.endswith(b"\r\n\r\n"):
            self._inlet.begin()  # no frame has come in together with the answer

    def _events(self) -> None:
        for event in self._protocol.events_received():
            if isinstance(event, Response):
                self._answered()
            elif isinstance(event, Frame) and event.opcode in _DATA and not self.closed:
                if event.opcode is not Opcode.CONT:
                    self._is_text = event.opcode is Opcode.TEXT
                self._fragments.append(event.data)  # type: ignore[arg-type]  # it is never a view here
                if event.fin:
                    fragments, self._fragments = self._fragments, []
                    message = fragments[0] if len(fragments) == 1 else b"".join(fragments)
                    self.on_message(message.decode("utf-8", "replace") if self._is_text else message)
        if not self.closed:
            self._flush()
        if self._protocol.close_expected() and self._transport is not None:
            self._transport.close()

    def _answered(self) -> None:
        if self._opened.done():
            return
        if self._protocol.handshake_exc is not None:
            self._opened.set_exception(self._protocol.handshake_exc)
        else:
            self._opened.set_result(None)

    def _flush(self) -> None:
        if self._transport is None:
            return
        for data in self._protocol.data_to_send():
            if data:
                self._transport.write(data)
            elif self._transport.can_write_eof():
                self._transport.write_eof()
