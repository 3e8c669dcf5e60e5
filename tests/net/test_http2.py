"""HTTP/2 at the hosts of secrets: curl and a client of ours, through the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

import anyio
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, WindowUpdated

from hutch.types import Refusal, Secret
from tests.net.conftest import IMAGE, call, call_tls
from tests.net.world import GOOD, OTHER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from tests.net.conftest import TlsCaller
    from tests.net.world import World

pytestmark = pytest.mark.anyio

VALUE = "tr3asure-9b1f6c"
MARK = "<HUTCH_SECRET:API_KEY>"


@pytest.fixture
async def box(runtime: LocalRuntime, world: World, monkeypatch: pytest.MonkeyPatch) -> LocalBox:
    """A box with a secret for good.test and one for a host below it, that may reach other.test too."""
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))  # what the gateway trusts
    secret = Secret(name="API_KEY", value=VALUE, hosts=("good.test",))
    other = Secret(name="OTHER", value="another", hosts=("sub.good.test",))
    box = await runtime.create(IMAGE, secrets=[secret, other], network=["other.test"])
    await box.start()
    return box


@pytest.fixture
async def ca(box: LocalBox, tmp_path: Path) -> Path:
    """Whom the box trusts."""
    await box.files.get("/etc/ssl/certs/ca-certificates.crt", tmp_path / "box-ca.pem")
    return tmp_path / "box-ca.pem"


class Client:
    """HTTP/2 over a connection of the box; it is spoken here."""

    def __init__(self, caller: TlsCaller) -> None:
        self._caller = caller
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.events: list[Event] = []

    async def ask(self, *more: tuple[str, str], host: str = "good.test", path: str = "/", body: bytes = b"") -> int:
        """Make a request, and return the number of its stream."""
        number = self.h2.get_next_available_stream_id()
        method = "POST" if body else "GET"
        head = [(":method", method), (":scheme", "https"), (":authority", host), (":path", path), *more]
        self.h2.send_headers(number, head, end_stream=not body)
        if body:
            self.h2.send_data(number, body, end_stream=True)
        await self._caller.send(self.h2.data_to_send())
        return number

    async def say(self, data: bytes) -> None:
        """Say what is no HTTP/2."""
        await self._caller.send(data)

    async def receive(self) -> bool:
        """Take what comes next; returns whether there was something. What is taken makes no room for more."""
        data = await self._caller.receive()
        if data:
            self.events += self.h2.receive_data(data)
        if said := self.h2.data_to_send():
            await self._caller.send(said)
        return bool(data)

    async def answer(self, number: int) -> tuple[str, bytes]:
        """Return the status and the body of an answer, as far as one came."""
        while not any(isinstance(e, StreamEnded) and e.stream_id == number for e in self.events):
            if not await self.receive():
                break
        answers = [e for e in self.events if isinstance(e, ResponseReceived) and e.stream_id == number]
        return str(answers[0].headers[0][1]) if answers else "", self.body(number)

    def body(self, number: int) -> bytes:
        return b"".join(e.data for e in self.events if isinstance(e, DataReceived) and e.stream_id == number)


@contextlib.asynccontextmanager
async def connected(box: LocalBox, ca: Path, address: str = GOOD, name: str = "good.test") -> AsyncIterator[Client]:
    caller = await call_tls(box, address, name, ca, protocols=["h2", "http/1.1"])
    try:
        assert await caller.handshake() and caller.tls.selected_alpn_protocol() == "h2"
        yield Client(caller)
    finally:
        await caller.close()


async def _refusal(box: LocalBox) -> Refusal:
    """Wait until something was refused."""
    with anyio.fail_after(10):
        while not (refusals := await box.network.log()):
            await anyio.sleep(0.02)
    return refusals[-1]


async def test_the_value_goes_into_headers_and_queries_for_its_host_alone(
    box: LocalBox, world: World, ca: Path
) -> None:
    async with connected(box, ca) as client:
        fields = [("x-key", MARK), ("x-other", "<HUTCH_SECRET:OTHER>"), ("cookie", f"a={MARK}")]
        number = await client.ask(*fields, path=f"/{MARK}?k={MARK}", body=MARK.encode())
        status, _ = await client.answer(number)
    assert status == "200"
    head, _, body = world.requests[0].partition("\n\n")
    assert f"x-key: {VALUE}\n" in head and f"cookie: a={VALUE}" in head and "x-other: <HUTCH_SECRET:OTHER>\n" in head
    assert f":path: /{MARK}?k={VALUE}\n" in head and body == MARK
    async with connected(box, world.ca, OTHER, "other.test") as client:
        await client.answer(await client.ask(("x-key", MARK), path=f"/?{MARK}", host="other.test"))
    assert f"x-key: {MARK}\n" in world.requests[1] and VALUE not in world.requests[1]


async def test_many_streams_of_one_connection(box: LocalBox, world: World, ca: Path) -> None:
    """All get their answers; one whose answer nobody takes holds up no other."""
    async with connected(box, ca) as client:
        numbers = [await client.ask(("x-key", MARK), path=f"/{each}") for each in range(50)]
        answers = [await client.answer(number) for number in numbers]
        assert answers == [("200", f"{GOOD} good.test /{each}\n".encode()) for each in range(50)]
        assert len(world.requests) == 50 and all(f"x-key: {VALUE}\n" in seen for seen in world.requests)
        client.h2.increment_flow_control_window(1 << 24)
        long = await client.ask(path="/long")
        with anyio.fail_after(20):
            while len(client.body(long)) < 65535:
                await client.receive()
        assert await client.answer(await client.ask(path="/quick")) == ("200", f"{GOOD} good.test /quick\n".encode())
        assert len(client.body(long)) == 65535
        client.h2.increment_flow_control_window(1 << 23, long)
        await client.ask(path="/on")
        assert await client.answer(long) == ("200", b"y" * (3 << 20))
        assert not any(isinstance(event, WindowUpdated) and event.stream_id == long for event in client.events)


async def test_an_authority_that_differs_from_the_server_name_is_refused(box: LocalBox, world: World, ca: Path) -> None:
    for host in ("other.test", "good.test:8443", "good.test@other.test"):
        async with connected(box, ca) as client:
            status, body = await client.answer(await client.ask(("x-key", MARK), host=host))
            assert status == "403" and body.startswith(b"hutch: ")
    assert not world.requests
    assert (await _refusal(box)).name == "good.test"


async def test_what_is_malformed_ends_the_connection(box: LocalBox, world: World, ca: Path) -> None:
    caller = await call_tls(box, GOOD, "good.test", ca, protocols=["h2"])
    assert await caller.handshake()
    await caller.send(b"GET / HTTP/1.1\r\nHost: good.test\r\nX-Key: <HUTCH_SECRET:API_KEY>\r\n\r\n")
    while await caller.receive():
        pass
    await caller.close()
    assert not world.requests
    assert "malformed HTTP/2" in (await _refusal(box)).reason


async def test_a_host_without_http2_is_asked_in_http1(box: LocalBox, world: World, ca: Path) -> None:
    """The box is told to speak what the host speaks."""
    world.speak("http/1.1")
    try:
        caller = await call_tls(box, GOOD, "good.test", ca, protocols=["h2", "http/1.1"])
        assert await caller.handshake() and caller.tls.selected_alpn_protocol() == "http/1.1"
        await caller.send(f"GET / HTTP/1.1\r\nHost: good.test\r\nX-Key: {MARK}\r\n\r\n".encode())
        assert (await caller.receive()).startswith(b"HTTP/1.1 200 ")
        await caller.close()
    finally:
        world.speak("h2", "http/1.1")
    assert f"x-key: {VALUE}" in world.requests[0].lower()


@contextlib.asynccontextmanager
async def _bridge(box: LocalBox, address: str) -> AsyncIterator[int]:
    """Give a port of this side, whose connections are connections of the box to port 443 of an address."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        carriers.append(task)
        caller = await call(box, address, 443)

        async def out() -> None:
            while data := await reader.read(65536):
                await caller.send(data)
            await caller.end()

        sending = asyncio.create_task(out())
        try:
            while data := await caller.receive():
                writer.write(data)
                await writer.drain()
        finally:
            sending.cancel()
            writer.close()
            await caller.close()

    carriers: list[asyncio.Task[None]] = []
    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.sleep(0)  # one that was just accepted has begun then
        for task in carriers:
            task.cancel()
        await asyncio.gather(*carriers, return_exceptions=True)


async def test_curl(box: LocalBox, world: World, ca: Path, tmp_path: Path) -> None:
    """Several requests at once over one connection, a long answer, and a body."""
    (tmp_path / "body").write_bytes(os.urandom(300_000).hex().encode() + MARK.encode())
    async with _bridge(box, GOOD) as port:
        common = ["--http2", "--cacert", str(ca), "--connect-to", f"good.test:443:127.0.0.1:{port}", "-sS", "-m", "30"]
        common += ["-H", f"Authorization: Bearer {MARK}", "-w", "%{http_version} %{http_code}\n"]
        common += ["--remote-name-all", "--output-dir", str(tmp_path)]
        for words in (
            ["-Z", *(f"https://good.test/{each}" for each in range(8))],
            ["https://good.test/long"],
            ["--data-binary", f"@{tmp_path}/body", "https://good.test/sent"],
        ):
            done = await anyio.run_process(["curl", *common, *words], check=False)
            assert done.returncode == 0, done.stderr
            assert set(done.stdout.decode().splitlines()) == {"2 200"}
    assert all((tmp_path / str(each)).read_text() == f"{GOOD} good.test /{each}\n" for each in range(8))
    assert (tmp_path / "long").read_bytes() == b"y" * (3 << 20)
    assert len(world.requests) == 10 and all(f"authorization: Bearer {VALUE}\n" in seen for seen in world.requests)
    assert world.requests[-1].endswith((tmp_path / "body").read_text())
