"""HTTP/2 between a box and a host of its secrets: the sockets of `hutch.core.http2`."""

from __future__ import annotations

import asyncio
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
    """Serves one connection of a box. ``requests``: how many came.

    Each side has a task that listens and one that speaks, so a side that does not read is listened to all the same,
    and so is the other.
    """

    def __init__(self, box: Link, peer: Link, rewrite: Callable[[Fields], Fields]) -> None:
        """``rewrite``: see `Relay`."""
        self._links = (box, peer)
        self._relay = Relay(rewrite)
        self._something = (asyncio.Event(), asyncio.Event())  # that there may be something to be said
        self._is_ending = False
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
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._speak, Side.BOX)
                await self._converse()
                tasks.cancel_scope.deadline = anyio.current_time() + _FAREWELL_SECONDS
                self._is_ending = True
                self._something[Side.BOX].set()
                with contextlib.suppress(OSError):
                    # To close before the box does could cost it what was sent.
                    while not isinstance(self._error, Malformed) and await self._links[Side.BOX].receive():
                        pass
        finally:
            for link in self._links:
                link.close()
        if self._error is not None:
            raise self._error

    async def _converse(self) -> None:
        with self._scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._speak, Side.PEER)
                tasks.start_soon(self._listen_to_peer)
                await self._listen(Side.BOX)
                self._scope.cancel()

    async def _listen_to_peer(self) -> None:
        await self._listen(Side.PEER)
        if self._error is not None:
            self._scope.cancel()
        else:
            self._relay.peer_ended()
            self._something[Side.BOX].set()

    async def _listen(self, side: Side) -> None:
        """Take what a side says, until its end."""
        try:
            while True:
                self._scope.deadline = anyio.current_time() + IDLE_SECONDS
                data = await self._links[side].receive()
                if not data:
                    return
                for start in range(0, len(data), _PIECE_BYTES):
                    self._relay.receive(side, data[start : start + _PIECE_BYTES])
                for each in self._something:
                    each.set()
        except BrokenError as error:
            self._error = _told(error)
        except OSError:
            pass

    async def _speak(self, side: Side) -> None:
        """Send a side what there is for it, until the conversation has ended or the side has gone."""
        try:
            while True:
                if data := self._relay.take(side):
                    self._something[side.other].set()
                    with anyio.fail_after(IDLE_SECONDS):
                        await self._links[side].send(data)
                    continue
                if self._is_ending:
                    return
                if side is Side.BOX and self._relay.is_over:
                    self._scope.cancel()
                await self._something[side].wait()
                self._something[side].clear()
        except OSError as error:
            # What the peer said before is still of use, and who listens to it sees its end.
            if side is Side.BOX or isinstance(error, TimeoutError):
                self._scope.cancel()


def _told(error: BrokenError) -> Exception:
    if error.side is Side.PEER:
        return NetworkError(f"the host's answers cannot be passed on: {error}")
    return Malformed(str(error)) if error.malformed else Refused(str(error))
