"""The relay's connection to the agent of a box of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from typing import TYPE_CHECKING, Self

import anyio

from hutch.core import agentproto as proto
from hutch.core.frames import Decoder, Frame, FrameError
from hutch.core.relay import OWN_REQUESTS
from hutch.errors import UpstreamUnavailableError
from hutch.runtime.reader import AgentReader
from hutch.runtime.windows import Windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_HELLO_SECONDS = 10.0


class AgentSocket:
    """Takes over a connected, non-blocking socket; a context manager that closes it.

    To the relay it is also the shared memory of the execution that it watches (`hutch.core.relay.Shared`).
    """

    def __init__(self, sock: socket.socket, exec_id: str) -> None:
        self.hello = proto.Hello(0, 0, False, 0.0)
        self._socket = sock
        self._exec_id = exec_id
        self._reader = AgentReader(sock)
        self._windows = Windows(self, exec_id)
        self._loop = asyncio.get_running_loop()
        # One frame after the other, whoever sends it.
        self._sending = asyncio.Lock()
        self._numbers = itertools.cycle(OWN_REQUESTS)
        self._requests = bytearray()
        # Set while the event loop looks for more to read, and done once there is some.
        self._more: asyncio.Future[None] | None = None
        self._looking = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self._look_away()
        self._windows.close()
        self._reader.close()
        self._socket.close()

    async def greet(self) -> bytes:
        """Greet the agent for the watcher; return what it answered. Raises `UpstreamUnavailableError`."""
        decoder = Decoder()
        with contextlib.suppress(OSError, TimeoutError), anyio.fail_after(_HELLO_SECONDS):
            await self.send(proto.hello(1))
            while data := await self.read():
                for frame in decoder.receive(data):
                    answer = proto.decode_answer(frame)
                    if not isinstance(answer, proto.Hello):
                        raise UpstreamUnavailableError("the box's agent does not speak our protocol; restart the box")
                    self.hello = answer
                    return frame.payload
        raise UpstreamUnavailableError("the box's agent does not answer; stop the box if it stays like that")

    async def read(self) -> bytes:
        """Return what has come, nothing at the end. Raises `OSError`, `FrameError`."""
        if self._requests:
            requests, self._requests = bytes(self._requests), bytearray()
            await self.send(requests)
        while True:
            try:
                return bytes(self._reader.receive())
            except (BlockingIOError, InterruptedError):
                await self._wait()

    async def send(self, data: bytes) -> None:
        """Send whole frames. Raises `OSError`."""
        async with self._sending:
            await self._loop.sock_sendall(self._socket, data)

    async def leave(self) -> None:
        """Leave in order: once the agent has closed its side too, it has read all that was sent."""
        with anyio.move_on_after(1, shield=True), contextlib.suppress(OSError, FrameError):
            self._socket.shutdown(socket.SHUT_WR)
            while await self.read():
                pass

    def turn(self, exec_id: str) -> None:
        """From now on it is about another execution."""
        self._exec_id = exec_id
        self._windows.close()
        self._windows = Windows(self, exec_id)

    # Shared memory.

    def request_window(self, exec_id: str, stream: int, take: Callable[[int, int], None]) -> None:
        """Ask for a stream's window, before the next read. See `hutch.runtime.channel.Channel.request_window`."""
        number = next(self._numbers)
        self._reader.expect(number, take)
        self._requests += proto.simple(proto.Request.SHM, req=number, exec_id=exec_id, stream=stream)

    def count(self, stream: int, length: int) -> None:
        """See `hutch.core.relay.Shared`."""
        self._windows.count(stream, length)

    def answered(self, type: int, req: int, payload: bytes) -> None:
        """See `hutch.core.relay.Shared`."""
        answer = proto.decode_answer(Frame(type, 0, req, "", payload))
        if answer is None or not self._reader.answered(req, answer):
            raise FrameError("the agent answered what it was not asked")

    def pieces(self, stream: int, position: int, length: int) -> Iterable[tuple[int, memoryview]]:
        """See `hutch.core.relay.Shared`."""
        return self._windows.pieces(stream, position, length)

    # Private methods: a socket that is busy, or quiet, is not registered anew for each read.

    async def _wait(self) -> None:
        self._more = self._loop.create_future()
        if not self._looking:
            self._looking = True
            self._loop.add_reader(self._socket, self._on_readable)
        await self._more

    def _on_readable(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)
        else:
            self._look_away()

    def _look_away(self) -> None:
        if self._looking:
            self._looking = False
            self._loop.remove_reader(self._socket)
