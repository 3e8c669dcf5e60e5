"""Where the chunks of one stream go: a sink, a consumer that iterates, a collecting buffer, or nowhere.

Each output tells (by the ``delivered`` function it was made with) up to which position its bytes were handed over;
that is what releases the agent's window, and what the end of an execution waits for.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import math
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from hutch.errors import HutchError
from hutch.runtime.sinkthread import SinkThread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hutch.core.sinks import Sink

# Bytes handed to a sink in one call, at most.
_BATCH = 1 << 20


class Output(Protocol):
    """The receiving end of a stream."""

    def feed(self, end: int, data: bytes | memoryview) -> None:
        """Take a chunk; ``end`` is the position after its last byte. A memoryview is only valid until
        ``delivered(end)``."""

    def end(self) -> None:
        """No more chunks will come."""

    def close(self) -> None:
        """Nobody wants the rest."""


class Collector:
    """Keeps the first ``limit`` bytes and counts the rest."""

    def __init__(self, delivered: Callable[[int], None], limit: int) -> None:
        self._delivered = delivered
        self._limit = limit
        self._data = bytearray()
        self.overflow = 0

    def feed(self, end: int, data: bytes | memoryview) -> None:
        room = self._limit - len(self._data)
        if len(data) <= room:
            self._data += data
        else:
            self._data += data[:room]
            self.overflow += len(data) - room
        self._delivered(end)

    def end(self) -> None: ...

    def close(self) -> None: ...

    def getvalue(self) -> bytes:
        """Return what was kept."""
        return bytes(self._data)


class Consumer:
    """Hands chunks to whoever iterates. What is not taken stays unacknowledged, and so holds back the command."""

    def __init__(self, delivered: Callable[[int], None], why_closed: Callable[[], BaseException]) -> None:
        self._delivered = delivered
        self._why_closed = why_closed
        self._chunks: deque[tuple[int, bytes]] = deque()
        self._ended = False
        self._closed = False
        self._news = asyncio.Event()

    def feed(self, end: int, data: bytes | memoryview) -> None:
        if self._closed:
            self._delivered(end)
            return
        self._chunks.append((end, bytes(data)))
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    def close(self) -> None:
        self._closed = True
        if self._chunks:
            self._delivered(self._chunks[-1][0])
            self._chunks.clear()
        self._news.set()

    async def next(self) -> bytes | None:
        """Return the next chunk, ``None`` at the end."""
        while not self._chunks:
            if self._closed:
                raise self._why_closed()
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        end, data = self._chunks.popleft()
        self._delivered(end)
        return data


class Pump:
    """Feeds a sink from a task of its own, so that a slow sink holds back its own stream and nothing else.

    The first error of the sink is kept in ``error``; from then on the stream is read and thrown away. ``lock`` is
    held while the sink is called: the pumps of one sink share it.
    """

    def __init__(
        self, delivered: Callable[[int], None], sink: Sink, spawn: Callable[..., None], lock: anyio.Lock
    ) -> None:
        self._delivered = delivered
        self.sink = sink
        self.lock = lock
        self._thread = SinkThread()
        self._call = _caller(sink, self._thread)
        self._keep_view = isinstance(sink, (io.RawIOBase, io.BufferedIOBase))
        self._spawn = spawn
        self._chunks: deque[tuple[int, bytes | memoryview]] = deque()
        self._running = False
        self._ended = False
        self._closed = False
        self.error: BaseException | None = None

    def feed(self, end: int, data: bytes | memoryview) -> None:
        if self._closed or self.error is not None:
            self._delivered(end)
            return
        self._chunks.append((end, data))
        if not self._running:
            self._running = True
            self._spawn(self._run)

    def end(self) -> None:
        self._ended = True
        self._leave()

    def close(self) -> None:
        self._ended = self._closed = True
        self._leave()

    async def _run(self) -> None:
        try:
            while self._chunks:
                end, data = self._batch()
                if self.error is None and not self._closed:
                    try:
                        async with self.lock:
                            await self._call(data)
                    except Exception as error:
                        self.error = error
                    except asyncio.CancelledError as error:
                        if anyio.current_effective_deadline() == -math.inf:
                            raise  # the runtime is being closed
                        self.error = HutchError("the sink was cancelled")
                        self.error.__cause__ = error
                self._delivered(end)
        finally:
            self._running = False
            self._leave()

    def _leave(self) -> None:
        if self._ended and not self._running:
            self._thread.close()

    def _batch(self) -> tuple[int, bytes | memoryview]:
        end, data = self._chunks.popleft()
        parts, size = [data], len(data)
        while self._chunks and size + len(self._chunks[0][1]) <= _BATCH:
            end, data = self._chunks.popleft()
            parts.append(data)
            size += len(data)
        if len(parts) == 1 and (self._keep_view or isinstance(data, bytes)):
            return end, data
        return end, b"".join(parts)


class Discard:
    """Throws everything away, as an absent writer does in os/exec."""

    def __init__(self, delivered: Callable[[int], None]) -> None:
        self._delivered = delivered

    def feed(self, end: int, data: bytes | memoryview) -> None:
        self._delivered(end)

    def end(self) -> None: ...

    def close(self) -> None: ...


class OutputStream:
    """An output as the caller sees it: iterate it once. Implements `hutch.sdk.base.Stream`."""

    def __init__(self, claim: Callable[[], Any], dropped: Callable[[], int]) -> None:
        self._claim = claim
        self._dropped = dropped

    @property
    def dropped(self) -> int:
        """Bytes that were lost because nobody read them in time, so far."""
        return self._dropped()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        consumer: Consumer = await self._claim()
        try:
            while (data := await consumer.next()) is not None:
                yield data
        finally:
            consumer.close()  # a reader that leaves must not hold up the command

    async def read(self) -> bytes:
        """Return all that is left, up to end of file."""
        return b"".join([data async for data in self])


def _caller(sink: Sink, thread: SinkThread) -> Callable[[bytes | memoryview], Any]:
    write = getattr(sink, "write", None)
    if write is None:
        function: Callable[[Any], Any] = sink  # type: ignore[assignment]  # a Sink without write is callable

        async def call(data: bytes | memoryview) -> None:
            result = function(data)
            if inspect.isawaitable(result):
                await result

        return call
    if inspect.iscoroutinefunction(write):
        return write  # type: ignore[no-any-return]
    if isinstance(sink, io.BytesIO):

        async def store(data: bytes | memoryview) -> None:
            write(data)

        return store
    if isinstance(sink, io.RawIOBase):
        return lambda data: thread.call(_write_all, write, data)

    async def hand_over(data: bytes | memoryview) -> None:
        result = await thread.call(write, data)
        if inspect.isawaitable(result):
            await result

    return hand_over


def _write_all(write: Callable[[memoryview], int | None], data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        written = write(view)
        if written is None:
            raise BlockingIOError("the sink is a non-blocking file that takes no more")
        view = view[written:]
