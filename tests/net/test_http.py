"""Plain HTTP to peers that are admitted by name: what is parsed and written anew arrives as it was meant."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.net.conftest import IMAGE, call
from tests.net.world import ADDRESSES, OTHER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from tests.net.world import World

pytestmark = pytest.mark.anyio

PORT = 8088


@pytest.fixture
async def box(runtime: LocalRuntime) -> LocalBox:
    """A box that may reach other.test."""
    box = await runtime.create(IMAGE, network=["other.test"])
    await box.start()
    assert ADDRESSES["other.test"] == [OTHER]
    return box


@contextlib.contextmanager
def _server(world: World, handle: Callable[[socket.socket], None]) -> Iterator[None]:
    listener = world.serve(OTHER, PORT, handle)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _read_until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        piece = connection.recv(65536)
        if not piece:
            break
        data += piece
    return data


async def _ask(box: LocalBox, *pieces: str) -> bytes:
    caller = await call(box, OTHER, PORT)
    for piece in pieces:
        await caller.send(piece.encode())
    answer = await caller.receive_all()
    await caller.close()
    return answer


async def test_chunked_bodies_both_ways(box: LocalBox, world: World) -> None:
    seen = []

    def handle(connection: socket.socket) -> None:
        seen.append(_read_until(connection, b"0\r\n\r\n"))
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        )

    head = f"POST /x HTTP/1.1\r\nHost: other.test:{PORT}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    with _server(world, handle):
        answer = await _ask(box, head, "3\r\nabc\r\n", "4\r\ndefg\r\n0\r\n\r\n")
    assert seen[0].startswith(b"POST /x HTTP/1.1\r\n") and b"abc" in seen[0] and b"defg" in seen[0]
    assert answer.startswith(b"HTTP/1.1 200 OK") and b"hello" in answer


async def test_a_long_answer_without_a_length(box: LocalBox, world: World) -> None:
    data = os.urandom(2 << 20)

    def handle(connection: socket.socket) -> None:
        _read_until(connection, b"\r\n\r\n")
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + data)

    with _server(world, handle):
        answer = await _ask(box, f"GET / HTTP/1.0\r\nHost: other.test:{PORT}\r\n\r\n")
    assert answer.partition(b"\r\n\r\n")[2] == data


async def test_a_body_that_waits_for_100(box: LocalBox, world: World) -> None:
    seen = []

    def handle(connection: socket.socket) -> None:
        seen.append(_read_until(connection, b"body"))
        connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")

    with _server(world, handle):
        caller = await call(box, OTHER, PORT)
        await caller.send(
            f"PUT / HTTP/1.1\r\nHost: other.test:{PORT}\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert (await caller.receive()).startswith(b"HTTP/1.1 100 ")
        await caller.send(b"body")
        assert (await caller.receive()).startswith(b"HTTP/1.1 204 ")
        await caller.close()
    assert seen[0].endswith(b"\r\n\r\nbody")


async def test_web_sockets_pass(box: LocalBox, world: World) -> None:
    def handle(connection: socket.socket) -> None:
        assert b"upgrade: websocket" in _read_until(connection, b"\r\n\r\n").lower()
        connection.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nfirst"
        )
        while data := connection.recv(65536):
            connection.sendall(data)

    with _server(world, handle):
        caller = await call(box, OTHER, PORT)
        await caller.send(
            f"GET / HTTP/1.1\r\nHost: other.test:{PORT}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n".encode()
        )
        answer = await caller.receive()
        while not answer.endswith(b"first"):
            answer += await caller.receive()
        assert answer.startswith(b"HTTP/1.1 101 ")
        await caller.send(b"\x81\x05hello")
        assert await caller.receive() == b"\x81\x05hello"
        await caller.end()
        assert await caller.receive_all() == b""
        await caller.close()


async def test_an_answer_that_breaks_off_is_not_made_whole(box: LocalBox, world: World) -> None:
    def handle(connection: socket.socket) -> None:
        _read_until(connection, b"\r\n\r\n")
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")

    with _server(world, handle):
        answer = await _ask(box, f"GET / HTTP/1.1\r\nHost: other.test:{PORT}\r\n\r\n")
    assert answer.endswith(b"only this") and b"content-length: 100" in answer.lower()


async def test_a_connection_that_the_peer_has_closed_is_not_used_again(box: LocalBox, world: World) -> None:
    served = []

    def handle(connection: socket.socket) -> None:
        served.append(_read_until(connection, b"\r\n\r\n"))
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    request = f"GET / HTTP/1.1\r\nHost: other.test:{PORT}\r\n\r\n".encode()
    with _server(world, handle):
        caller = await call(box, OTHER, PORT)
        for number in range(3):
            await caller.send(request)
            answer = b""
            while not answer.endswith(b"ok"):
                answer += await caller.receive()
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert len(served) == number + 1
            # Its end is under way: a request that crosses it would be a 502, which nobody can prevent.
            await anyio.sleep(0.05)
        await caller.close()


async def test_a_peer_without_an_answer_is_a_502(box: LocalBox, world: World) -> None:
    with _server(world, lambda connection: None):
        answer = await _ask(box, f"GET / HTTP/1.1\r\nHost: other.test:{PORT}\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 502 ")
