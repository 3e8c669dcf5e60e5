"""Joined sockets: bytes, ends and resets in both directions."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.lowlevel
import pytest

from hutch.net.meter import Meter
from hutch.net.relay import Relay, reset_at_close

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio


class Ends(NamedTuple):
    """The outer ends of two joined connections, and what was counted."""

    box: socket.socket
    peer: socket.socket
    meter: Meter
    ended: anyio.Event
    scope: anyio.CancelScope


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for end in (ours, theirs):
        end.setblocking(False)
    return ours, theirs


@contextlib.asynccontextmanager
async def _joined() -> AsyncIterator[Ends]:
    (box, near), (peer, far) = _pair(), _pair()
    meter = Meter()
    ends = Ends(box, peer, meter, anyio.Event(), anyio.CancelScope())

    async def run() -> None:
        with ends.scope:
            await Relay(near, far, meter).run()
        ends.ended.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        with anyio.fail_after(30):
            yield ends
            for end in (box, peer):
                end.close()
            await ends.ended.wait()
    assert near.fileno() == far.fileno() == -1


async def _read(connection: socket.socket) -> bytes:
    data = b""
    while piece := await asyncio.get_running_loop().sock_recv(connection, 1 << 20):
        data += piece
    return data


async def test_bytes_and_ends() -> None:
    loop = asyncio.get_running_loop()
    there, back = os.urandom(5 << 20), os.urandom(3 << 20)
    async with _joined() as ends:

        async def write(connection: socket.socket, data: bytes) -> None:
            await loop.sock_sendall(connection, data)
            connection.shutdown(socket.SHUT_WR)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write, ends.box, there)
            assert hashlib.sha256(await _read(ends.peer)).digest() == hashlib.sha256(there).digest()
            tasks.start_soon(write, ends.peer, back)  # after the end of the other way
            assert await _read(ends.box) == back
        await ends.ended.wait()
        assert (ends.meter.outward.total, ends.meter.inward.total) == (len(there), len(back))


@pytest.mark.parametrize("side", ["box", "peer"])
async def test_a_reset_is_a_reset(side: str) -> None:
    async with _joined() as ends:
        one, other = (ends.box, ends.peer) if side == "box" else (ends.peer, ends.box)
        await asyncio.get_running_loop().sock_sendall(one, b"x")
        assert await asyncio.get_running_loop().sock_recv(other, 10) == b"x"
        reset_at_close(one)
        one.close()
        with pytest.raises(ConnectionResetError):
            await _read(other)


async def test_cancelling_resets_both() -> None:
    async with _joined() as ends:
        await anyio.lowlevel.checkpoint()
        ends.scope.cancel()
        for end in (ends.box, ends.peer):
            with pytest.raises(ConnectionResetError):
                await _read(end)


async def test_a_reader_that_stops_stops_its_sender_alone() -> None:
    loop = asyncio.get_running_loop()
    async with _joined() as slow, _joined() as quick:
        sent = 0
        with anyio.move_on_after(1):
            while True:
                await loop.sock_sendall(slow.box, bytes(1 << 16))
                sent += 1 << 16
        assert sent < 32 << 20
        await loop.sock_sendall(quick.box, b"past it")
        assert await loop.sock_recv(quick.peer, 100) == b"past it"
        await loop.sock_sendall(slow.peer, b"the other way")
        assert await loop.sock_recv(slow.box, 100) == b"the other way"
