"""HTTP/2 between a box and a host of its secrets: the sockets of `hutch.core.http2`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import anyio

from hutch.core.http2 import BrokenError, Relay, Side
from hutch.errors import NetworkError
from hutch.net.http import IDLE_SECONDS, Malformed, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from hutch.core.http2 import Fields
    from hutch.net.link import Link

# So that little comes of one reading: a header of a few bytes can stand for many.
_PIECE_BYTES = 4096
_FAREWELL_SECONDS = 2.0


class Exchange:
    """Serves one connection of a box. ``requests``: how many came."""

    def __init__(self, box: Link, peer: Link, rewrite: Callable[[Fields], Fields]) -> None:
        """``rewrite``: see `Relay`."""
        self._links = (box, peer)
        self._relay = Relay(rewrite)
        self._has_peer = True
        self._error: Exception | None = None
        self._scope = anyio.CancelScope()

    @property
    def requests(self) -> int:
        """See the class."""
        return self._relay.requests

    async def run(self) -> None:
        """Serve until an end; closes both sides. Raises `Refused` (the box was told), or `NetworkError` for a peer that
        does not speak HTTP/2 as it should."""
        try:
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._carry_box)
                    tasks.start_soon(self._carry_peer)
            with anyio.move_on_after(_FAREWELL_SECONDS), contextlib.suppress(OSError):
                await self._flush(Side.BOX)
                # To close before the box does could cost it what was sent.
                while not isinstance(self._error, Malformed) and await self._links[Side.BOX].receive():
                    pass
        finally:
            for link in self._links:
                link.close()
        if self._error is not None:
            raise self._error

    async def _carry_box(self) -> None:
        with contextlib.suppress(OSError):
            await self._carry(Side.BOX)
        self._scope.cancel()

    async def _carry_peer(self) -> None:
        with contextlib.suppress(OSError):
            await self._carry(Side.PEER)
        self._has_peer = False
        if self._error is None:
            self._relay.peer_ended()
            with contextlib.suppress(OSError):
                await self._flush(Side.BOX)
        if self._error is not None or self._relay.is_over:
            self._scope.cancel()

    async def _carry(self, side: Side) -> None:
        """Pass on what a side says, until its end or that of the conversation."""
        await self._flush(side)
        while not self._relay.is_over:
            self._scope.deadline = anyio.current_time() + IDLE_SECONDS
            data = await self._links[side].receive()
            if not data:
                return
            for start in range(0, len(data), _PIECE_BYTES):
                try:
                    self._relay.receive(side, data[start : start + _PIECE_BYTES])
                except BrokenError as error:
                    self._error = _told(error)
                    return
                await self._flush(side.other)
                await self._flush(side)

    async def _flush(self, side: Side) -> None:
        if not (data := self._relay.take(side)):
            return
        if side is Side.BOX:
            await self._links[side].send(data)
        elif self._has_peer:
            with contextlib.suppress(OSError):  # what it said before is still of use, and its reader sees the end
                await self._links[side].send(data)


def _told(error: BrokenError) -> Exception:
    if error.side is Side.PEER:
        return NetworkError(f"the host's answers cannot be passed on: {error}")
    return Malformed(str(error)) if error.malformed else Refused(str(error))
