"""Connections to the relay of one box that their commands have left: the next command is started on one, which spares
two requests and two connections."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hutch.sdk.remote_channel import RemoteChannel

# The agent serves 64 connections in all.
_MOST = 4
# Below the time after which a silent peer counts as lost.
_IDLE_SECONDS = 10.0


class Lines:
    """See the module."""

    def __init__(self) -> None:
        self._idle: list[tuple[RemoteChannel, asyncio.TimerHandle]] = []
        self._closed = False

    def take(self) -> RemoteChannel | None:
        """The connection that was left last, for the caller alone."""
        while self._idle:
            channel, timer = self._idle.pop()
            timer.cancel()
            if channel.reusable:
                return channel
            channel.close()
        return None

    def give(self, channel: RemoteChannel) -> bool:
        """Keep a connection for a while; false when that cannot be."""
        if self._closed or not channel.reusable or len(self._idle) >= _MOST:
            return False
        timer = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._expire, channel)
        self._idle.append((channel, timer))
        return True

    def close(self) -> None:
        """Close all, and keep none from now on."""
        self._closed = True
        for channel, timer in self._idle:
            timer.cancel()
            channel.close()
        self._idle.clear()

    def _expire(self, channel: RemoteChannel) -> None:
        self._idle = [pair for pair in self._idle if pair[0] is not channel]
        channel.close()
