"""Output read from shared memory: the agent's window of a stream, mapped into this process.

A busy stream costs one copy (pipe to window) instead of three. What the sink is given is a view of the window; the
agent does not overwrite it before it was acknowledged.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING, Protocol

from hutch.core.frames import FrameError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hutch.core.agentproto import Hello

# A stream that has delivered this much in frames is read from shared memory from then on.
_SHARE_AFTER = 1 << 20


class Sharer(Protocol):
    """The connection to an agent, as far as shared windows go."""

    hello: Hello

    def request_window(self, exec_id: str, stream: int, take: Callable[[int, int], None]) -> None: ...


class Windows:
    """The shared windows of one execution, on one connection."""

    def __init__(self, channel: Sharer, exec_id: str) -> None:
        self._channel = channel
        self._exec_id = exec_id
        self._volume: dict[int, int] = {}
        self._asked: set[int] = set()
        self._maps: dict[int, mmap.mmap] = {}
        self._closed = False

    def count(self, stream: int, length: int) -> None:
        """Note that bytes came in a frame; a stream that proves busy is switched over."""
        volume = self._volume[stream] = self._volume.get(stream, 0) + length
        if volume >= _SHARE_AFTER and stream not in self._asked and self._channel.hello.shared_memory:
            self._asked.add(stream)
            self._channel.request_window(self._exec_id, stream, lambda fd, size: self._map(stream, fd, size))

    def pieces(self, stream: int, position: int, length: int) -> list[tuple[int, memoryview]]:
        """Return the views that hold these bytes, each with the position after its last. Raises `FrameError`."""
        window = self._maps.get(stream)
        if window is None:
            raise FrameError("the agent announced shared output without having shared its window")
        view = memoryview(window)
        if length > len(view):
            raise FrameError("the agent announced more output than its window holds")
        offset = position % len(view)
        first = min(length, len(view) - offset)
        pieces = [(position + first, view[offset : offset + first])]
        if first < length:
            pieces.append((position + length, view[: length - first]))
        return pieces

    def close(self) -> None:
        """Unmap. A view that a sink still holds keeps its map until it lets go."""
        self._closed = True
        for window in self._maps.values():
            with contextlib.suppress(BufferError):
                window.close()
        self._maps.clear()

    def _map(self, stream: int, fd: int, size: int) -> None:
        try:
            if size != self._channel.hello.window:
                raise FrameError("the agent passed a window of another size than it has told")
            if not self._closed:
                self._maps[stream] = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
