"""Peers that hang, vanish, break off or cut what they say, and a gateway that is killed: a program in the box sees an
error or gets everything, others notice nothing, and the gateway keeps nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anyio
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived

from hutch.host.proc import poll_until
from hutch.net.relay import reset_at_close
from hutch.types import Secret
from tests.net import programs
from tests.net.conftest import gateways
from tests.net.test_programs import image_store
from tests.net.world import GOOD, OTHER
from tests.runtime.helpers import in_time, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from hutch.types import Result
    from tests.net.world import World

pytestmark = [pytest.mark.anyio, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

__all__ = ["image_store"]

READ, TERMINATED, OPAQUE = 8088, 8443, 8089
LENGTH = 1 << 20
# How a program gets to the server: by plain HTTP of which each request is judged, by TLS that the gateway ends, in
# HTTP/1.1 and HTTP/2, and by connections that it passes on.
WAYS = {
    "read": f"http://good.test:{READ}",
    "TLS": f"https://good.test:{TERMINATED}",
    "HTTP/2": f"https://good.test:{TERMINATED}",
    "opaque": f"http://{OTHER}:{OPAQUE}",
}
# Another protocol, spoken until an end that is announced.
SWITCH = """
import socket, ssl, sys
port, path = int(sys.argv[1]), sys.argv[2]
end = socket.create_connection(("good.test", port))
end.settimeout(20)
if port == 8443:
    context = ssl.create_default_context()
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    end = context.wrap_socket(end, server_hostname="good.test", suppress_ragged_eofs=False)
head = f"GET {path} HTTP/1.1\\r\\nHost: good.test:{port}\\r\\nConnection: upgrade\\r\\nUpgrade: websocket\\r\\n\\r\\n"
end.sendall(head.encode())
heard = b""
while not heard.endswith(b"first"):
    heard += (piece := end.recv(65536))
    assert piece, heard
if path.endswith("echo"):
    end.sendall(b"again")
    assert end.recv(65536) == b"again"
    print("served")
else:
    try:
        print("ended" if end.recv(65536) == b"" else "?")
    except OSError:
        print("cut")
"""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LENGTH
SAID = {
    "head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "body": HEAD + b"b" * 100_000,
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nff\r\nonly",
    "endless": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"b" * 100_000,
    "switch": b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nfirst",
    "all": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"b" * LENGTH,
}


class Server:
    """Says a part of an answer, which the path names (``/PART/then``), and then ends, resets or hangs."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.go_on = threading.Event()
        self.asked: list[str] = []

    def plain(self, connection: socket.socket) -> None:
        self._answer(connection, connection)

    def under_tls(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a reset comes after what was said
        raw = connection.dup()
        with raw:
            self.world.under_tls(connection, lambda tls: self._answer(tls, raw))

    def _answer(self, connection: socket.socket, raw: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(65536)
        self.asked.append(head.decode().split()[1])
        _, part, then = self.asked[-1].split("/")
        connection.sendall(SAID[part])
        if part == "switch" and then == "echo":
            while data := connection.recv(65536):
                connection.sendall(data)
        if part == "switch" and then == "end" and isinstance(connection, ssl.SSLSocket):
            connection.unwrap()
        self._then(then, connection, raw)
        if then == "hang":
            connection.sendall(b"b" * (LENGTH - 100_000))

    def _then(self, then: str, connection: socket.socket, raw: socket.socket) -> None:
        if then == "hang":
            self.go_on.wait(30)
        elif then == "reset":
            reset_at_close(raw)

    def http2(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a reset comes after what was said
        raw = connection.dup()
        with raw:
            self.world.under_tls(connection, lambda tls: self._answer_http2(tls, raw))

    def _answer_http2(self, connection: socket.socket, raw: socket.socket) -> None:
        server = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        server.initiate_connection()
        connection.sendall(server.data_to_send())
        stream, path = 0, ""
        while not path:
            for event in server.receive_data(connection.recv(65536)):
                if isinstance(event, RequestReceived):
                    stream = event.stream_id
                    path = next(str(value) for name, value in event.headers if str(name) == ":path")
        self.asked.append(path)
        _, part, then = path.split("/")
        if part != "head":
            server.send_headers(stream, [(":status", "200"), ("content-length", str(LENGTH))])
            for _ in range(10):
                server.send_data(stream, b"b" * 10_000)
        connection.sendall(server.data_to_send())
        self._then(then, connection, raw)


class Scene(NamedTuple):
    """A box, the server that it asks, and the gateway between them."""

    box: LocalBox
    server: Server
    home: Path

    async def fetch(self, way: str, path: str, *options: str) -> Result:
        """Let curl fetch something; the output is what it got."""
        version = "--http2" if way == "HTTP/2" else "--http1.1"
        return await self.box.run("curl", "-sS", version, "-m", "20", *options, WAYS[way] + path, timeout=30)

    def descriptors(self) -> int:
        (pid,) = gateways(self.home)
        return len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def _listening(world: World, *, http2: bool) -> Iterator[Server]:
    server = Server(world)
    if not http2:
        world.speak("http/1.1")
    listeners = [
        world.serve(GOOD, READ, server.plain),
        world.serve(GOOD, TERMINATED, server.http2 if http2 else server.under_tls),
        world.serve(OTHER, OPAQUE, server.plain),
    ]
    try:
        yield server
    finally:
        server.go_on.set()
        world.speak("h2", "http/1.1")
        for listener in listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@pytest.fixture
async def scene(
    request: pytest.FixtureRequest, runtime: LocalRuntime, world: World, home: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Scene]:
    """The gateway has as many descriptors in the end as in the beginning."""
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))
    secret = Secret(name="API_KEY", value="tr3asure-9b1f6c", hosts=("good.test", f"good.test:{TERMINATED}"))
    box = await runtime.create(programs.IMAGE, secrets=[secret], network=[OTHER, f"good.test:{READ}", "good.test:80"])
    await box.start()
    for url in ("http://good.test/", "https://good.test/", f"http://{OTHER}/"):
        assert (await box.run("curl", "-sS", url)).ok
    way = request.getfixturevalue("way") if "way" in request.fixturenames else ""
    with _listening(world, http2=way == "HTTP/2") as server:
        scene = Scene(box, server, home)
        (pid,) = gateways(home)
        before = scene.descriptors()
        yield scene
        server.go_on.set()
        if gateways(home) == [pid]:
            assert await poll_until(lambda: scene.descriptors() <= before, 10), _open_files(home)


def _open_files(home: Path) -> list[str]:
    (pid,) = gateways(home)
    return [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]


CUTS = {
    "read": ["/head/end", "/head/reset", "/body/end", "/body/reset", "/chunk/end", "/endless/reset"],
    "TLS": ["/head/end", "/head/reset", "/body/end", "/body/reset", "/chunk/end", "/endless/reset", "/endless/end"],
    "HTTP/2": ["/head/end", "/head/reset", "/body/end", "/body/reset"],
    # A head that ends in the middle comes as it is, and curl takes it for a whole answer.
    "opaque": ["/head/reset", "/body/end", "/body/reset", "/chunk/end", "/endless/reset"],
}


@pytest.mark.parametrize("way", WAYS)
async def test_what_is_cut_is_an_error(scene: Scene, way: str) -> None:
    """So is an end that TLS does not announce, which anybody on the way could have made, where nothing else tells what
    is all."""
    for number, path in enumerate(CUTS[way]):
        done = await scene.fetch(way, path, "--fail")
        assert done.exit_code not in (0, 28), (path, done.stderr)
        assert scene.server.asked[number:] == [path], "it was asked once"
    if way in ("read", "opaque"):
        done = await scene.fetch(way, "/endless/end", "--fail")
        assert done.ok and done.stdout == b"b" * 100_000, "the control"


@pytest.mark.parametrize("way", ["read", "opaque"])
async def test_a_cut_answer_without_a_length_for_an_old_client(scene: Scene, way: str) -> None:
    """Such a client takes an end for all of it."""
    assert not (await scene.fetch(way, "/endless/reset", "--http1.0")).ok
    done = await scene.fetch(way, "/all/end", "--http1.0")
    assert done.ok and done.stdout == b"b" * LENGTH, "the control"


@pytest.mark.parametrize(("way", "port"), [("read", READ), ("TLS", TERMINATED)])
async def test_another_protocol_ends_as_it_is_ended(scene: Scene, way: str, port: int) -> None:
    """In order, or by a break; and nothing is kept of one whose client has gone."""
    for then, expected in (("echo", "served"), ("end", "ended"), ("reset", "cut")):
        done = await scene.box.run("python3", "-c", SWITCH, str(port), f"/switch/{then}", timeout=30)
        assert done.text == f"{expected}\n", (then, done.stderr)


@pytest.mark.parametrize("way", WAYS)
async def test_a_server_that_hangs_holds_up_nobody(scene: Scene, way: str) -> None:
    """It may go on later; the program of the box has given up, or gets it all."""
    for part in ("head", "body"):
        done = await scene.fetch(way, f"/{part}/hang", "-m", "1")
        assert done.exit_code == 28, done.stderr
    for other in ("http://good.test/", "https://good.test/", f"http://{OTHER}/"):
        with in_time(5):
            assert (await scene.box.run("curl", "-sS", other)).ok
    if way != "HTTP/2":
        program = await scene.box.exec("curl", "-sS", "-m", "20", "-o", "/tmp/all", WAYS[way] + "/body/hang")
        await until(lambda: len(scene.server.asked) == 3)
        scene.server.go_on.set()
        assert (await program.wait()).ok
        assert await scene.box.files.read("/tmp/all") == b"b" * LENGTH


@pytest.mark.parametrize("way", WAYS)
async def test_a_killed_gateway_cuts_what_goes_through_it(scene: Scene, way: str) -> None:
    """Nothing that looks like an end; afterwards everything is as before."""
    path = "/body/hang" if way == "HTTP/2" else "/endless/hang"
    old = [] if way == "HTTP/2" else ["--http1.0"]
    program = await scene.box.exec("curl", "-sS", *old, "-m", "20", "-o", "/tmp/part", WAYS[way] + path)

    async def arrived() -> bool:
        size = await scene.box.run("sh", "-c", "stat -c %s /tmp/part 2>/dev/null || echo 0")
        return int(size.text) >= 16_000

    await until(arrived)
    (gateway,) = gateways(scene.home)
    os.kill(gateway, signal.SIGKILL)
    done = await program.wait()
    assert done.exit_code not in (0, 28), done.stderr
    scene.server.go_on.set()
    assert await poll_until(lambda: gateways(scene.home) not in ([], [gateway]), 20)
    with in_time():
        while not (await scene.box.run("curl", "-sS", "-m", "5", "https://good.test/")).ok:
            await anyio.sleep(0.05)


@contextlib.contextmanager
def _vanished(world: World) -> Iterator[None]:
    """Let the servers hear nothing any more, without an end of any connection, and let the host give up soon."""
    patience = Path("/proc/sys/net/ipv4/tcp_retries2")
    before = patience.read_text()
    patience.write_text("2")
    ports = f"{{ {READ}, {TERMINATED}, {OPAQUE} }}"
    world.nft(f"table ip vanished {{ chain heard {{ type filter hook input priority 0; tcp dport {ports} drop; }}; }}")
    try:
        yield
    finally:
        world.nft("delete table ip vanished")
        patience.write_text(before)


@pytest.mark.parametrize("way", ["read", "TLS", "opaque"])
async def test_a_server_that_vanishes_while_it_is_sent_something(scene: Scene, world: World, way: str) -> None:
    upload = f"head -c 50000000 /dev/zero | curl -sS --fail -m 25 -T - --http1.1 {WAYS[way]}/body/hang"
    program = await scene.box.exec("sh", "-c", upload)
    await until(lambda: len(scene.server.asked) == 1)
    with _vanished(world):
        assert (await scene.box.run("curl", "-sS", "-m", "5", "https://good.test/")).ok, "others notice nothing"
        done = await program.wait()
        assert done.exit_code not in (0, 28), done.stderr


@pytest.mark.parametrize("way", WAYS)
async def test_a_server_that_vanishes_while_it_is_waited_for(scene: Scene, way: str) -> None:
    """The kernel asks whether it is there, and ends the connection when nobody answers."""
    program = await scene.box.exec("curl", "-sS", "-m", "20", WAYS[way] + "/head/hang")
    await until(lambda: len(scene.server.asked) == 1)
    ports = f"( dport = {READ} or dport = {TERMINATED} or dport = {OPAQUE} )"

    async def asks() -> bool:
        command = ["ss", "-tnoH", "state", "established", ports]
        shown = (await anyio.run_process(command)).stdout.decode().splitlines()
        return bool(shown) and all("timer:(keepalive," in line for line in shown)

    await until(asks)
    await program.kill()
    await program.wait()
