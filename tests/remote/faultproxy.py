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
    """What happens to one connection. ``after`` and ``taken``: bytes that come from the server, or from the client,
    before the fault takes place; ``None``: none does. ``kind``: *cut* (a close), *reset* (RST), *stall* (nothing passes
    any more, both ways), *half-open* (the server's side is closed, the client is not told)."""

    kind: str = "cut"
    after: int | None = None
    taken: int | None = None
    slice: int = READ
    latency: float = 0.0


class FaultProxy:
    """Listens in front of ``port``, on ``listen`` or a port of its own. ``choose`` gives the fault for each new
    connection; ``watch`` sees what the server says."""

    def __init__(
        self,
        port: int,
        choose: Callable[[], Fault] = Fault,
        *,
        listen: int = 0,
        watch: Callable[[bytes], None] = lambda data: None,
    ) -> None:
        self._port = port
        self._listen = listen
        self._watch = watch
        self.choose = choose
        self._connections: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.faults = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._listen, limit=READ)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut_one(self, chance: random.Random) -> None:
        """Cut one of the connections now."""
        if self._connections:
            self._end(chance.choice(list(self._connections)), "reset")
            self.faults += 1

    def cut_all(self) -> None:
        """Cut every connection now."""
        for pair in list(self._connections):
            self._end(pair, "reset")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        # Its end by the end of the proxy is in order; asyncio would report a cancelled handler as broken.
        with contextlib.suppress(asyncio.CancelledError):
            await self._pass_on(reader, writer, self.choose())
        self._tasks.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault) -> None:
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._port, limit=READ)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, other_writer)
        self._connections.add(pair)
        try:
            up = asyncio.ensure_future(self._pump(reader, other_writer, fault, fault.taken))
            down = asyncio.ensure_future(self._pump(other_reader, writer, fault, fault.after, self._watch))
            done, _ = await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            struck = any(not side.cancelled() and side.exception() is None and side.result() for side in done)
            if struck:
                self.faults += 1
            if struck and fault.kind in ("stall", "half-open"):
                for side in (up, down):
                    side.cancel()
                await asyncio.gather(up, down, return_exceptions=True)
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

    async def _hold(self, reader: asyncio.StreamReader) -> None:
        """Keep the client's connection, as a dead peer does, until the client gives up."""
        with contextlib.suppress(OSError):
            while await reader.read(READ):
                pass

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        fault: Fault,
        after: int | None,
        watch: Callable[[bytes], None] = lambda data: None,
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
                watch(data)
                if fault.latency:
                    await asyncio.sleep(fault.latency)
                if writer.transport.is_closing():
                    return False
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
    """A chooser: some connections are cut or reset at a random byte, mostly of what the server says."""
    chance = random.Random(seed)

    def choose() -> Fault:
        if chance.random() >= share:
            return Fault()
        kind, at = chance.choice(["cut", "reset"]), int(most ** chance.random())
        return Fault(kind=kind, after=at) if chance.random() < 0.8 else Fault(kind=kind, taken=at)

    return choose
