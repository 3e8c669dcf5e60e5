"""The channels to the agents of the boxes that run: one for each box, shared by all that this process does there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from hutch.errors import HutchError, RuntimeClosedError
from hutch.runtime.channel import AgentChannel

if TYPE_CHECKING:
    import socket

    from hutch.runtime.engines import Engines
    from hutch.state import BoxRecord, Store


class Channels:
    """See the module."""

    def __init__(self, store: Store, engines: Engines) -> None:
        self._store = store
        self._engines = engines
        self._channels: dict[str, AgentChannel] = {}
        self._connecting: dict[str, anyio.Lock] = {}
        # Settings of boxes that were used through a channel: what an execution needs of the record.
        self._settings: dict[str, BoxRecord] = {}
        self._closed = False

    def settings(self, box_id: str) -> BoxRecord:
        """Return the record of a box whose channel is open (it may lag behind in state, not in configuration)."""
        return self._settings.get(box_id) or self._store.box(box_id)

    def find(self, box_id: str) -> AgentChannel | None:
        """Return the channel that is open, if one is."""
        channel = self._channels.get(box_id)
        return channel if channel is not None and not channel.closed else None

    def connecting(self, box_id: str) -> anyio.Lock:
        """Return the lock under which one of many callers makes the channel that all will use."""
        return self._connecting.setdefault(box_id, anyio.Lock())

    async def open(self, box_id: str) -> AgentChannel:
        """Return the channel to a box that runs; a new one, if none is open."""
        if (channel := self.find(box_id)) is not None:
            return channel
        channel = await self.own(box_id)
        self._channels[box_id] = channel
        self._settings[box_id] = self._store.box(box_id)
        return channel

    async def reconnect(self, box_id: str, *, own: bool = False) -> AgentChannel | None:
        """Return a new channel after the old one was lost, ``None`` if the box does not run any more."""
        if self._closed:
            return None
        try:
            async with self.connecting(box_id):
                if not own and (channel := self.find(box_id)) is not None:
                    return channel
                engine, directory = self._engines.of_box(box_id)
                if not engine.observe(directory).running:
                    return None
                return await (self.own(box_id) if own else self.open(box_id))
        except HutchError:
            return None

    async def own(self, box_id: str) -> AgentChannel:
        """Return a new channel for one watcher alone, which closes it: on one channel each execution has one
        watcher."""
        return await AgentChannel.open(await self.connect(box_id))

    async def connect(self, box_id: str) -> socket.socket:
        """Return a new connection to a box's agent, as the engine gives it."""
        engine, directory = self._engines.of_box(box_id)
        return await engine.connect(directory)

    def drop(self, box_id: str) -> None:
        """The box has ended: close the channel to it, once all that it said is read."""
        channel = self._channels.pop(box_id, None)
        if channel is not None:
            channel.drain()

    def forget(self, box_id: str) -> None:
        """The box is removed."""
        self.drop(box_id)
        self._settings.pop(box_id, None)
        self._connecting.pop(box_id, None)

    def close(self) -> None:
        """Close all channels."""
        self._closed = True
        for channel in list(self._channels.values()):
            channel.close(RuntimeClosedError("the runtime was closed"))
        self._channels.clear()
