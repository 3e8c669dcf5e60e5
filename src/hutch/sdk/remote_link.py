"""A relay's connection to the next relay: messages both ways, with back-pressure both ways, without a look inside."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hutch.sdk.remote_socket import WebSocket

# Messages that may wait before no more are read.
_WAITING = 4


class RemoteLink:
    """Takes over a WebSocket that was just dialled."""

    def __init__(self, ws: WebSocket) -> None:
        self._ws = ws
        self._messages: deque[bytes | bytearray | str] = deque()
        self._news = asyncio.Event()
        ws.on_message = self._on_message
        ws.on_lost = self._news.set

    async def receive(self) -> bytes | bytearray | str:
        """Return the next message, an empty one at the end."""
        while not self._messages:
            if self._ws.closed:
                return b""
            self._news.clear()
            await self._news.wait()
        message = self._messages.popleft()
        if len(self._messages) < _WAITING:
            self._ws.resume()
        return message

    async def send(self, message: bytes | str) -> None:
        """Send a message, and wait while too much waits to be sent. Raises `ConnectionResetError` at the end."""
        if self._ws.closed:
            raise ConnectionResetError("the next relay is gone")
        self._ws.send(message)
        await self._ws.drain()

    async def aclose(self) -> None:
        """Close. Idempotent."""
        self._ws.close()

    def _on_message(self, message: bytes | bytearray | str) -> None:
        self._messages.append(message)
        self._news.set()
        if len(self._messages) >= _WAITING:
            self._ws.pause()
