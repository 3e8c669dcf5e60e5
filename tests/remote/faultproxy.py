"""A TCP proxy that misbehaves as networks do: delays, slices, cuts, resets, swallows, stalls."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from typing import TYPE_CHECKING, Self

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

READ = 64 * 1024


class Fault(msgspec.Struct, frozen=True):
    """What happens to one connection. ``after``: bytes that come from the server before the fault takes place;
    ``None``: none does. ``kind``: *cut* (a close), *reset* (RST), *stall* (nothing passes any more, both ways),
    *half-open* (the server's side is closed, the client is not told)."""

    kind: str = "cut"
    after: int | None = None
    slice: int = READ
    latency: float = 0.0


class FaultProxy:
    """Listens on a port of its own in front of ``port``. ``choose`` gives the fault for each new connection."""

    def __init__(self, port: int, choose: Callable[[], Fault]) -> None:
        self._port = port
        self._choose = choose
        self._connections: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.faults = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=READ)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut_all(self) -> None:
        """Cut every connection now."""
        for pair in list(self._connections):
            self._end(pair, "reset")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        fault = self._choose()
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._port, limit=READ)
        except OSError:
            writer.transport.abort()
            self._tasks.discard(task)
            return
        pair = (writer, other_writer)
        self._connections.add(pair)
        try:
            up = asyncio.ensure_future(self._pump(reader, other_writer, fault, None))
            down = asyncio.ensure_future(self._pump(other_reader, writer, fault, fault.after))
            done, _ = await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            struck = down in done and not down.cancelled() and down.exception() is None and down.result()
            if struck:
                self.faults += 1
            if struck and fault.kind in ("stall", "half-open"):
                up.cancel()
                await asyncio.gather(up, return_exceptions=True)
                if fault.kind == "half-open":
                    other_writer.transport.abort()
                await self._hold(reader)
            for side in (up, down):
                side.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            self._end(pair, fault.kind if struck else "cut")
        finally:
            self._connections.discard(pair)
            for end in pair:
                end.transport.abort()
            self._tasks.discard(task)

    async def _hold(self, reader: asyncio.StreamReader) -> None:
        """Keep the client's connection, as a dead peer does, until the client gives up."""
        with contextlib.suppress(OSError):
            while await reader.read(READ):
                pass

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault, after: int | None
    ) -> bool:
        """Pass bytes on; true if the fault's time has come."""
        passed = 0
        while True:
            size = fault.slice if after is None else min(fault.slice, after - passed)
            if size <= 0:
                return True
            try:
                data = await reader.read(size)
                if not data:
                    return False
                if fault.latency:
                    await asyncio.sleep(fault.latency)
                writer.write(data)
                await writer.drain()
            except OSError:
                return False
            passed += len(data)

    def _end(self, pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter], kind: str) -> None:
        for writer in pair:
            if kind == "reset":
                with contextlib.suppress(OSError):
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            else:
                writer.close()


def random_cuts(seed: int, share: float = 0.5, most: int = 40_000) -> Callable[[], Fault]:
    """A chooser: some connections are cut or reset at a random byte."""
    chance = random.Random(seed)

    def choose() -> Fault:
        if chance.random() >= share:
            return Fault()
        return Fault(kind=chance.choice(["cut", "reset"]), after=int(most ** chance.random()))

    return choose
