"""Clients that mean no good. The server stays responsive to others, its memory bounded, and is as before after."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest

from tests.server.conftest import IMAGE, KEY, Served, empty, make_home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.root

MEMORY = 64 << 20
SPARE_DESCRIPTORS = 4
# What another client's request may take meanwhile; alone it takes a few milliseconds.
PATIENCE = 3.0
BEARER = {"Authorization": f"Bearer {KEY}"}
UPGRADE = (
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    f"Authorization: Bearer {KEY}\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n{more}\r\n"
)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Served]:
    """A server with a key."""
    home = make_home(tmp_path_factory.mktemp("hostile"), images)
    server = Served(home, env={"HUTCH_API_KEY": KEY})
    yield server
    code = server.stop()
    empty(home)
    assert code == 0
    assert "Traceback" not in server.errors, server.errors


@pytest.fixture
def unharmed(guarded: Served) -> Iterator[Callable[[], None]]:
    """Check that the server answers others in time; and afterwards, that it is as it was before."""
    with httpx2.Client(base_url=guarded.url, headers=BEARER, timeout=PATIENCE) as http:

        def answers() -> None:
            for path in ("/health", "/v1/boxes"):
                assert http.get(path).status_code == 200

        answers()
        memory, descriptors = _rss(guarded), _descriptors(guarded)
        yield answers
        answers()
        deadline = time.monotonic() + 30
        while _descriptors(guarded) > descriptors + SPARE_DESCRIPTORS and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _descriptors(guarded) <= descriptors + SPARE_DESCRIPTORS
        assert _rss(guarded) <= memory + MEMORY


@pytest.fixture(scope="module")
def execution(guarded: Served) -> str:
    """The path of a command that runs."""
    with httpx2.Client(base_url=guarded.url, headers=BEARER, timeout=30) as http:
        box = http.post("/v1/boxes", json={"image": IMAGE}).json()["box_id"]
        body = {"command": "cat"}
        return f"/v1/boxes/{box}/executions/{http.post(f'/v1/boxes/{box}/exec', json=body).json()['execution_id']}"


def _rss(server: Served) -> int:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _descriptors(server: Served) -> int:
    return sum(1 for _ in Path(f"/proc/{server.process.pid}/fd").iterdir())


def _connect(server: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def _upgrade(server: Served, path: str, more: str = "") -> socket.socket:
    """A WebSocket, just opened."""
    sock = _connect(server)
    sock.sendall(UPGRADE.format(path=path, more=more).encode())
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(4096)
    assert head.startswith(b"HTTP/1.1 101"), head
    return sock


def _ended(sock: socket.socket, seconds: float) -> bool:
    """Whether the server ends the connection in time, or says at least that it does (and waits for the answer)."""
    sock.settimeout(seconds)
    try:
        while data := sock.recv(1 << 16):
            if data[-4:-2] == b"\x88\x02":
                break
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def test_slow_bodies(guarded: Served, unharmed: Callable[[], None]) -> None:
    """Bodies that trickle in hold nobody up. (Heads: tests/server/test_kept.py.)"""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(_connect(guarded)) for _ in range(100)]
        for sock in socks:
            sock.sendall(
                f"POST /v1/boxes HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
                "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{".encode()
            )
        for _ in range(5):
            for sock in socks:
                sock.sendall(b" ")
            unharmed()


def test_idle_sockets(guarded: Served, unharmed: Callable[[], None]) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(_connect(guarded))
        for _ in range(5):
            unharmed()


def test_a_flood_of_refused_keys(guarded: Served, unharmed: Callable[[], None]) -> None:
    over, begun = threading.Event(), threading.Barrier(5)
    counts: list[int] = []

    def flood() -> None:
        count = 0
        with httpx2.Client(base_url=guarded.url, headers={"Authorization": "Bearer no"}, timeout=30) as http:
            begun.wait(20)
            while not over.is_set():
                assert http.get("/v1/boxes").status_code == 401
                count += 1
        counts.append(count)

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        begun.wait(20)
        for _ in range(50):
            unharmed()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert sum(counts) > 50


def test_giant_heads_and_bodies(guarded: Served, unharmed: Callable[[], None]) -> None:
    huge = b"x" * (1 << 20)
    for head in (
        b"GET /" + huge + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-A: " + huge + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 100_000 + b"\r\n",
        b"\0" * (1 << 20),
        f"POST /v1/boxes HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\n"
        "Transfer-Encoding: chunked\r\n\r\nfffffffff\r\n".encode()
        + huge * 4,
        f"POST /v1/boxes HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Length: 99999999999\r\n\r\n".encode()
        + huge * 4,
    ):
        with _connect(guarded) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(head)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            assert _ended(sock, 10), head[:60]
        unharmed()


def test_giant_frames(guarded: Served, unharmed: Callable[[], None], execution: str) -> None:
    """A frame that says that it is larger than any may be is refused before it comes."""
    for sizes in ((0xFF, 1 << 62), (0xFF, 1 << 31)):
        for path, more in (
            (f"{execution}/attach", ""),
            (f"{execution}/relay", "Sec-WebSocket-Protocol: hutch.agent.v1\r\n"),
        ):
            with _upgrade(guarded, path, more) as sock:
                sock.sendall(struct.pack("!BBQ", 0x82, *sizes) + b"\0" * 4)
                with contextlib.suppress(OSError):
                    sock.sendall(b"x" * (1 << 20))
                assert _ended(sock, 10)
        unharmed()


def test_garbage_on_the_socket(guarded: Served, unharmed: Callable[[], None], execution: str) -> None:
    def frame(opcode: int, payload: bytes) -> bytes:
        length = len(payload)
        size = bytes((0x80 | length,)) if length < 126 else struct.pack("!BH", 0xFE, length)
        return bytes((0x80 | opcode,)) + size + b"\0\0\0\0" + payload

    attach, relay = (f"{execution}/attach", ""), (f"{execution}/relay", "Sec-WebSocket-Protocol: hutch.agent.v1\r\n")
    # It begins with a whole frame, or the rest of one would be waited for.
    garbage = b"\xf3\x85\0\0\0\0hello" + random.Random(1).randbytes(4096)
    ends = [
        (attach, garbage),
        (relay, frame(2, garbage)),
        (relay, garbage),
        (relay, frame(2, b"\xff" * 24)),
        (attach, frame(1, b"\xff\xfe")),
        (attach, b"\x02\x05hello"),
        (attach, frame(8, b"x")),
    ]
    for (path, more), data in ends:
        with _upgrade(guarded, path, more) as sock:
            sock.sendall(data)
            assert _ended(sock, 20), data[:20]
        unharmed()
    for path, more in (attach, relay):
        with _upgrade(guarded, path, more) as sock:
            for text in (b"", b"[]", b"{}", b"[" * 4000, b'{"type": 1}', b'{"watcher": "x", "exec": 5}', b"nul\0"):
                sock.sendall(frame(1, text))
            unharmed()


def test_many_watchers_that_read_nothing(guarded: Served, unharmed: Callable[[], None]) -> None:
    """Each is held by its own command's window, and not by the server's memory."""
    with httpx2.Client(base_url=guarded.url, headers=BEARER, timeout=30) as http, contextlib.ExitStack() as stack:
        box = http.post("/v1/boxes", json={"image": IMAGE}).json()["box_id"]
        for number in range(30):
            started = http.post(f"/v1/boxes/{box}/exec", json={"command": "cat", "args": ["/dev/zero"]})
            path = f"/v1/boxes/{box}/executions/{started.json()['execution_id']}/"
            more = "Sec-WebSocket-Protocol: hutch.agent.v1\r\n" if number % 2 else ""
            stack.enter_context(_upgrade(guarded, path + ("relay" if number % 2 else "attach"), more))
        for _ in range(10):
            unharmed()
            time.sleep(0.1)
        assert http.delete(f"/v1/boxes/{box}", params={"force": "true"}).status_code == 204
