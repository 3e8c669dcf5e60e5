"""HTTP/2 at the host of a secret, where a side does not read: the other goes on, and little is held."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

import anyio
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived
from h2.settings import SettingCodes
from hyperframe.frame import PingFrame

from hutch.host.proc import poll_until
from tests.net.conftest import gateways
from tests.net.test_programs import SHELF, VALUE, box, image_store, site
from tests.net.world import GOOD
from tests.runtime.helpers import in_time, next_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.execution import LocalExecution
    from tests.net.world import World

pytestmark = [pytest.mark.anyio, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

__all__ = ["box", "image_store", "site"]

MOST_MEMORY = 24 << 10
"""By how many KiB the gateway may grow."""

_CLIENT = """
import os, socket, ssl, sys
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import FlowControlError
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes

def connected(port=443):
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(20)
    raw.connect((sys.argv[1], port))
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2"])
    tls = context.wrap_socket(raw, server_hostname="good.test")
    h2 = H2Connection(H2Configuration(client_side=True))
    h2.initiate_connection()
    h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: (1 << 31) - 1})
    h2.increment_flow_control_window((1 << 31) - 70000)
    tls.sendall(h2.data_to_send())
    while h2.outbound_flow_control_window == 65535:
        h2.receive_data(tls.recv(16384))
    tls.sendall(h2.data_to_send())
    return tls, h2

def ask(h2, path, body=b""):
    number = h2.get_next_available_stream_id()
    head = [(":method", "POST" if body else "GET"), (":scheme", "https"), (":path", path)]
    h2.send_headers(number, head + [(":authority", authority), ("x-key", os.environ["API_KEY"])], end_stream=not body)
    for start in range(0, len(body), 16384):
        h2.send_data(number, body[start : start + 16384])
    if body:
        h2.end_stream(number)
    return number

authority = "good.test"
"""

_UPLOAD = """
tls, h2 = connected()
numbers = [ask(h2, "/long") for _ in range(4)]
tls.sendall(h2.data_to_send())
print("asked", flush=True)
sys.stdin.readline()
numbers.append(ask(h2, "/sent", b"b" * 200_000))
tls.sendall(h2.data_to_send())
print("sent", flush=True)
sys.stdin.readline()
sizes, ended = dict.fromkeys(numbers, 0), set()
while ended != set(numbers):
    for event in h2.receive_data(tls.recv(65536)):
        if isinstance(event, DataReceived):
            sizes[event.stream_id] += len(event.data)
            h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, StreamEnded):
            ended.add(event.stream_id)
    tls.sendall(h2.data_to_send())
print(*(sizes[number] for number in numbers), flush=True)
"""

_DOWNLOAD = """
authority = f"good.test:{sys.argv[2]}"
tls, h2 = connected(int(sys.argv[2]))
first = ask(h2, "/first")
tls.sendall(h2.data_to_send())
while not any(isinstance(event, ResponseReceived) for event in h2.receive_data(tls.recv(65536))):
    pass
tls.settimeout(1)
for _ in range(99):  # more than all buffers on the way take
    try:
        ask(h2, "/second", b"b" * 65536)
    except FlowControlError:
        pass
    tls.sendall(h2.data_to_send())
    tls.setblocking(False)
    try:
        h2.receive_data(tls.recv(65536))
    except ssl.SSLWantReadError:
        pass
    tls.settimeout(1)
print("full", flush=True)
tls.settimeout(20)
size = 0
while size < 200_000:
    for event in h2.receive_data(tls.recv(65536)):
        if isinstance(event, DataReceived):
            size += len(event.data)
print(size, flush=True)
"""

_PINGS = """
tls, h2 = connected()
from hyperframe.frame import PingFrame
pings = PingFrame(0, b"12345678").serialize() * 1000
try:
    while True:
        tls.sendall(pings)
except OSError as error:
    print("ended", type(error).__name__)
"""

_WAIT = """
authority = f"good.test:{sys.argv[2]}"
tls, h2 = connected(int(sys.argv[2]))
number = ask(h2, "/")
tls.sendall(h2.data_to_send())
try:
    while data := tls.recv(65536):
        for event in h2.receive_data(data):
            if isinstance(event, StreamReset):
                print("reset", flush=True)
except OSError:
    pass
print("ended")
"""


async def _start(box: LocalBox, program: str, *arguments: str) -> LocalExecution:
    return await box.exec("python3", "-c", _CLIENT + program, GOOD, *arguments, stdin=True)


@contextlib.contextmanager
def _server(world: World, handle: Callable[[socket.socket], None]) -> Iterator[None]:
    def under_tls(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        world.under_tls(connection, handle)

    listener = world.serve(GOOD, SHELF, under_tls)
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _memory(home: Path) -> int:
    """KiB that the gateway holds."""
    (pid,) = gateways(home)
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))


async def _refused(box: LocalBox, reason: str) -> None:
    async def said() -> bool:
        return any(reason in refusal.reason for refusal in await box.network.log())

    with in_time():
        while not await said():
            await anyio.sleep(0.02)


async def test_a_body_goes_up_while_answers_are_not_read(box: LocalBox, world: World, home: Path) -> None:
    """Four answers of 3 MiB each are under way; they come when the client reads on."""
    program = await _start(box, _UPLOAD)
    lines = aiter(program.stdout)
    assert await next_line(lines) == b"asked\n"
    assert await poll_until(lambda: len(world.requests) == 4, 10)
    before = _memory(home)
    await program.stdin.write(b"\n")
    assert await next_line(lines) == b"sent\n"
    assert await poll_until(lambda: len(world.requests) == 5, 10), "it is held up"
    assert world.requests[-1].endswith("\n" + "b" * 200_000) and f"x-key: {VALUE}\n" in world.requests[-1]
    assert _memory(home) - before < MOST_MEMORY
    await program.stdin.write(b"\n")
    with in_time(30):
        *long, last = (await next_line(lines)).split()
    assert long == [str(3 << 20).encode()] * 4 and int(last) < 100
    assert (await program.wait()).ok


async def test_an_answer_comes_down_while_a_body_is_not_read(box: LocalBox, world: World, home: Path) -> None:
    full = threading.Event()

    def serve(tls: socket.socket) -> None:
        server = H2Connection(H2Configuration(client_side=False))
        server.initiate_connection()
        server.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: (1 << 31) - 1})
        server.increment_flow_control_window((1 << 31) - 70000)
        tls.sendall(server.data_to_send())
        while not any(isinstance(event, RequestReceived) for event in server.receive_data(tls.recv(65536))):
            pass
        server.send_headers(1, [(":status", "200")])
        tls.sendall(server.data_to_send())
        full.wait(20)
        for _ in range(20):  # nothing more is read
            server.send_data(1, b"a" * 10_000)
            tls.sendall(server.data_to_send())
        full.clear()
        full.wait(20)

    with _server(world, serve):
        program = await _start(box, _DOWNLOAD, str(SHELF))
        lines = aiter(program.stdout)
        assert await next_line(lines) == b"full\n"
        before = _memory(home)
        full.set()
        assert await next_line(lines) == b"200000\n"
        assert _memory(home) - before < MOST_MEMORY
        full.set()
        await program.wait()


async def test_pings_of_a_client_that_does_not_read(box: LocalBox, world: World, home: Path) -> None:
    """It is given up, and others are served meanwhile."""
    assert (await box.run("curl", "-sS", "https://good.test/")).ok
    before = _memory(home)
    program = await _start(box, _PINGS)
    assert (await box.run("curl", "-sS", "-m", "20", "https://good.test/")).ok
    with in_time(30):
        assert (await next_line(aiter(program.stdout))).startswith(b"ended")
    await _refused(box, "it does not take what it is sent")
    assert _memory(home) - before < MOST_MEMORY


async def test_pings_of_a_host_that_does_not_read(box: LocalBox, world: World, home: Path) -> None:
    ended = threading.Event()

    def serve(tls: socket.socket) -> None:
        server = H2Connection(H2Configuration(client_side=False))
        server.initiate_connection()
        tls.sendall(server.data_to_send())
        while not any(isinstance(event, RequestReceived) for event in server.receive_data(tls.recv(65536))):
            pass
        try:
            while True:
                tls.sendall(PingFrame(0, b"12345678").serialize() * 1000)
        finally:
            ended.set()

    assert (await box.run("curl", "-sS", "https://good.test/")).ok
    before = _memory(home)
    with _server(world, serve):
        program = await _start(box, _WAIT, str(SHELF))
        with in_time(30):
            assert (await next_line(aiter(program.stdout))) == b"ended\n"
    assert await poll_until(ended.is_set, 10)
    await _refused(box, "it does not take what it is sent")
    assert _memory(home) - before < MOST_MEMORY
