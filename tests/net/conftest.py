"""Fixtures: a small internet, a runtime on this side of it, and a box that talks."""

from __future__ import annotations

import contextlib
import os
import ssl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import InvalidStateError
from hutch.runtime.runtime import LocalRuntime
from tests import rootfs
from tests.net import world as worlds
from tests.runtime.helpers import RuntimeOf

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from hutch.runtime.box import LocalBox
    from hutch.runtime.execution import LocalExecution

IMAGE = "busybox:test"


@pytest.fixture(scope="session")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of talk.c."""
    return _built(tmp_path_factory.mktemp("talk"), "talk")


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of probes.c."""
    return _built(tmp_path_factory.mktemp("probes"), "probes")


@pytest.fixture(scope="session")
def image_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image store that holds the test image."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    home = tmp_path_factory.mktemp("seed") / "home"
    tree = rootfs.build(tmp_path_factory.mktemp("image") / "rootfs")
    for name in ("talk", "probes"):
        _built(tree / "bin", name)

    async def load() -> None:
        async with LocalRuntime(home) as runtime:
            await runtime.images.load(tree, reference=IMAGE)

    anyio.run(load)
    return home / "images"


def _built(folder: Path, name: str) -> Path:
    program = folder / name
    subprocess.run(["gcc", "-static", "-O1", "-o", program, Path(__file__).with_name(f"{name}.c")], check=True)
    return program


@pytest.fixture(scope="module")
def internet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[worlds.World]:
    """The servers; this thread is on their network for as long as the module's tests run."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with pytest.MonkeyPatch.context() as patch, worlds.made(tmp_path_factory.mktemp("world")) as world:
        patch.setenv("HUTCH_DNS", worlds.NAMES)
        yield world


@pytest.fixture
def world(internet: worlds.World) -> worlds.World:
    """The servers, which have seen nothing yet."""
    internet.reset()
    return internet


# A cross-section, so that the suite stays quick; HUTCH_TEST_ISOLATION=vm runs all tests over VMs.
ON_VMS_TOO = {
    "test_a_disabled_box_can_get_a_network_while_it_runs",
    "test_a_disabled_network_has_none",
    "test_a_flood_of_conversations_is_bounded",
    "test_a_killed_gateway_comes_back_by_itself",
    "test_a_name_rule_admits_by_host_and_by_server_name",
    "test_a_new_policy_ends_conversations",
    "test_any_server_that_the_box_asks_is_the_gateway",
    "test_clients_of_a_udp_port_are_bounded",
    "test_enabled_reaches_everybody",
    "test_enabled_still_refuses_metadata_and_the_host",
    "test_half_closed_connections_go_on",
    "test_long_answers_are_cut_and_come_whole_by_a_stream",
    "test_many_tunnels_at_once",
    "test_names_carry_little_out",
    "test_only_the_peer_asked_can_answer",
    "test_pings_go_nowhere",
    "test_published_udp_ports",
    "test_refusals_are_answers",
    "test_refusals_are_told_at_once",
    "test_sizes",
    "test_spoofed_sources_and_fragments",
    "test_the_host_must_be_named",
    "test_the_policy_changes_while_the_box_runs",
    "test_the_policy_survives_a_restart_of_the_box",
    "test_the_value_arrives_and_the_box_has_a_placeholder",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the cross-section over both kinds of boxes."""
    if metafunc.function.__name__ in ON_VMS_TOO:
        metafunc.parametrize("isolation", ["container", "vm"])


@pytest.fixture
def isolation() -> str:
    """What the boxes are isolated by: containers, or what HUTCH_TEST_ISOLATION says."""
    return os.environ.get("HUTCH_TEST_ISOLATION", "container")


@pytest.fixture
async def home(tmp_path: Path, image_store: Path, vm_store: Path) -> AsyncIterator[Path]:
    """A fresh home that shares the images. Nothing of its boxes is left afterwards, and its gateway has not failed."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(image_store)
    (home / "vm").symlink_to(vm_store)
    yield home
    async with LocalRuntime(home) as runtime:
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)
    log = home / "gateway.log"
    assert not log.exists() or "Traceback" not in log.read_text()


@pytest.fixture
async def runtime(home: Path, world: worlds.World, isolation: str) -> AsyncIterator[LocalRuntime]:
    """A runtime over the fresh home."""
    runtime = RuntimeOf(home)
    runtime.isolation = isolation
    async with runtime:
        yield runtime


class Caller:
    """A TCP connection of a box, made by its nc(1): bytes in and out of the command."""

    def __init__(self, execution: LocalExecution) -> None:
        self._execution = execution
        self._chunks = aiter(execution.stdout)

    async def send(self, data: bytes) -> None:
        await self._execution.stdin.write(data)

    async def end(self) -> None:
        await self._execution.stdin.close()

    async def receive(self) -> bytes:
        with anyio.fail_after(20):
            return await anext(self._chunks, b"")

    async def receive_all(self) -> bytes:
        data = b""
        while piece := await self.receive():
            data += piece
        return data

    async def close(self) -> None:
        """Hang up; what was not received yet is thrown away, since an execution ends only when its output was taken."""
        with anyio.fail_after(20):
            with contextlib.suppress(InvalidStateError):  # it has ended
                await self._execution.kill()
            async for _ in self._chunks:
                pass
            await self._execution.wait()


async def call(box: LocalBox, address: str, port: int) -> Caller:
    """Connect from the box."""
    return Caller(await box.exec("nc", address, str(port), stdin=True))


async def get(box: LocalBox, address: str, host: str, port: int = 80, path: str = "/") -> str:
    """Make a plain HTTP request from the box and return the answer's body; empty when there was none."""
    caller = await call(box, address, port)
    await caller.send(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    await caller.end()
    answer = await caller.receive_all()
    await caller.close()
    return answer.decode().partition("\r\n\r\n")[2].strip()


class TlsCaller:
    """TLS over a connection of a box; it is spoken here."""

    def __init__(self, caller: Caller, context: ssl.SSLContext, name: str | None) -> None:
        self._caller = caller
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)

    async def handshake(self) -> bool:
        """Returns whether the other side took part. Raises `ssl.SSLError` for one that is not trusted."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                if not await self._feed():
                    return False
            except ssl.SSLError:
                await self._caller.send(self._outgoing.read())  # the alert
                raise
            else:
                return True

    async def send(self, data: bytes) -> None:
        self.tls.write(data)
        await self._caller.send(self._outgoing.read())

    async def receive(self) -> bytes:
        """Return the next bytes, none at the end."""
        while True:
            try:
                return self.tls.read()
            except ssl.SSLWantReadError:
                if not await self._feed():
                    return b""
            except ssl.SSLZeroReturnError:
                return b""

    async def close(self) -> None:
        await self._caller.close()

    async def _feed(self) -> bytes:
        await self._caller.send(self._outgoing.read())
        data = await self._caller.receive()
        self._incoming.write(data)
        return data


async def call_tls(
    box: LocalBox, address: str, name: str | None, ca: Path, *, port: int = 443, protocols: Sequence[str] = ()
) -> TlsCaller:
    """Connect from the box, with this server name; the handshake is left to the caller."""
    context = ssl.create_default_context(cafile=ca)
    if name is None:
        context.check_hostname = False
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return TlsCaller(await call(box, address, port), context, name)


async def get_tls(
    box: LocalBox,
    address: str,
    name: str | None,
    ca: Path,
    *,
    host: str | None = None,
    path: str = "/",
    more: str = "",
    body: str = "",
) -> str:
    """Make an HTTPS request from the box. Returns the body; empty when the connection was refused."""
    caller = await call_tls(box, address, name, ca)
    answer = b""
    try:
        if not await caller.handshake():
            return ""
        await caller.send(f"GET {path} HTTP/1.1\r\nHost: {host or name}\r\n{more}\r\n{body}".encode())
        while b"\n" not in answer.partition(b"\r\n\r\n")[2]:
            data = await caller.receive()
            if not data:
                return ""
            answer += data
    finally:
        await caller.close()
    return answer.decode().partition("\r\n\r\n")[2].strip()


def gateways(home: Path, module: str = "hutch.runtime.gateway") -> list[int]:
    """The processes that run a module for a home."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(home) in words and words[words.index(b"-m") + 1] == module.encode():
                found.append(int(entry.name))
    return found
