"""Published ports of boxes behind a server whose operator allows them."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from hutch.errors import AlreadyExistsError, HutchError, InvalidArgumentError, ResourceExhaustedError, UnsupportedError
from hutch.runtime.home import new_id
from hutch.runtime.runtime import LocalRuntime
from hutch.sdk.remote import RemoteRuntime
from hutch.types import BoxState, PublishedPort
from tests.net.conftest import IMAGE, image_store
from tests.net.test_gateway import _only_gateway
from tests.net.test_ports import _answers, _serve_echo
from tests.net.test_udp_ports import _Client
from tests.remote.conftest import TOKEN, serving, shared_home
from tests.remote.processes import free_port, free_ports
from tests.runtime.helpers import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from hutch.sdk.remote_box import RemoteBox
    from tests.remote.processes import Process

pytestmark = [pytest.mark.root, pytest.mark.anyio]

__all__ = ["image_store"]

FIRST = free_ports(100)
LAST = FIRST + 99
MOST = 8
ADDRESS = "127.0.0.2"
PUBLISHING = ("--publish-address", ADDRESS, "--publish-ports", f"{FIRST}-{LAST}", "--max-published", str(MOST))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, image_store: Path, vm_store: Path) -> Path:
    """The server's home."""
    home = shared_home(tmp_path_factory.mktemp("publishing"), image_store)
    (home / "vm").symlink_to(vm_store)
    return home


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Process]:
    """A server that publishes ports."""
    with serving(home, *PUBLISHING) as process:
        yield process


@pytest.fixture
async def elsewhere(tmp_path: Path, image_store: Path) -> AsyncIterator[Path]:
    """A home for servers of a test's own. Nothing of its boxes is left afterwards."""
    home = shared_home(tmp_path, image_store)
    yield home
    async with LocalRuntime(home) as runtime:
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)


async def _ports(box: RemoteBox) -> tuple[PublishedPort, ...]:
    return (await box.network.get()).ports


def tcp(host_port: int = 0, **fields: Any) -> PublishedPort:
    """A wish for a port that leads to the echo server."""
    return PublishedPort(port=8080, host_port=host_port, **fields)


async def _echoes(runtime: RemoteRuntime, *ports: PublishedPort, **fields: Any) -> RemoteBox:
    """A running box with an echo server at published ports."""
    box = await runtime.create(IMAGE, ports=ports, **fields)
    await box.start()
    await _serve_echo(box, 8080)
    return box


async def _runs(box: RemoteBox) -> bool:
    return (await box.info()).state is BoxState.RUNNING


@pytest.mark.parametrize("isolation", ["container", "vm"])
async def test_ports_are_given_where_the_operator_says(runtime: RemoteRuntime, home: Path, isolation: str) -> None:
    """One that is asked for, and ones that are free, for TCP and UDP; they stay when the gateway is killed, and go with
    the box."""
    wanted = FIRST + 7
    box = await _echoes(runtime, tcp(wanted), tcp(), tcp(protocol="udp"), isolation=isolation)
    ports = await _ports(box)
    assert [port.host_ip for port in ports] == [ADDRESS] * 3
    assert ports[0].host_port == wanted
    assert all(FIRST <= port.host_port <= LAST for port in ports)
    assert await _answers(ports[0]) and await _answers(ports[1])
    client = _Client(ports[2])
    with client.socket:
        assert await client.ask(b"by datagram") == b"by datagram"
    assert not await _answers(PublishedPort(port=8080, host_ip="127.0.0.1", host_port=wanted))
    stats = await box.stats()
    assert stats.network_sent_bytes == stats.network_received_bytes == 2 * len("published") + len("by datagram")

    os.kill(await _only_gateway(home), signal.SIGKILL)
    with anyio.fail_after(20):
        while not await _answers(ports[1]):
            await anyio.sleep(0.05)
    assert await _ports(box) == ports

    await box.stop(timeout=0)
    assert not await _answers(ports[0])
    stopped = await _ports(box)
    assert [(port.host_ip, port.host_port) for port in stopped] == [(ADDRESS, wanted), (ADDRESS, 0), (ADDRESS, 0)]
    await box.start()
    await _serve_echo(box, 8080)
    again = await _ports(box)
    assert again[0] == ports[0] and await _answers(ports[0]) and await _answers(again[1])


async def test_a_port_is_free_when_its_box_has_gone(runtime: RemoteRuntime, home: Path) -> None:
    """Although the gateway learns of both at the same time: that the one has ended, and the other is there."""
    box = await runtime.create(IMAGE, ports=[tcp(FIRST), tcp(FIRST + 1, protocol="udp")])
    await box.start()
    gateway = await _only_gateway(home)
    for _ in range(5):
        os.kill(gateway, signal.SIGSTOP)
        try:
            await box.remove(force=True)
            box = await runtime.create(IMAGE, ports=[tcp(FIRST), tcp(FIRST + 1, protocol="udp")])
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(box.start)
                await until(functools.partial(_runs, box))
                os.kill(gateway, signal.SIGCONT)
        finally:
            os.kill(gateway, signal.SIGCONT)


async def test_a_port_that_is_taken_is_a_conflict_that_tells_nothing(runtime: RemoteRuntime) -> None:
    """Also that of a box that does not run; the number is the other protocol's as well."""
    reserved = await runtime.create(IMAGE, ports=[tcp(FIRST)], name="reserved")
    running = await _echoes(runtime, tcp(), name="running")
    (chosen,) = await _ports(running)
    for taken in (FIRST, chosen.host_port):
        with pytest.raises(AlreadyExistsError, match=f"tcp port {taken} is taken") as told:
            await runtime.create(IMAGE, ports=[tcp(taken)], name="late")
        secrets = ("reserved", reserved.id, "running", running.id)
        assert not any(secret in str(told.value) for secret in secrets)
    await runtime.create(IMAGE, ports=[tcp(FIRST, protocol="udp")])
    assert sorted(info.name or "" for info in await runtime.list()) == ["", "reserved", "running"]


async def test_a_port_that_another_program_has_is_a_conflict_of_the_start(runtime: RemoteRuntime) -> None:
    with socket.create_server((ADDRESS, LAST)):
        box = await runtime.create(IMAGE, ports=[tcp(LAST)])
        with pytest.raises(AlreadyExistsError, match=f"tcp port {LAST} is taken"):
            await box.start()
        assert (await box.info()).state is BoxState.FAILED
    await box.start()
    assert (await _ports(box))[0].host_port == LAST


async def test_of_many_who_race_for_a_port_one_gets_it(runtime: RemoteRuntime) -> None:
    got, refused = [], []

    async def create() -> None:
        try:
            got.append(await runtime.create(IMAGE, ports=[tcp(FIRST + 1)]))
        except AlreadyExistsError as error:
            refused.append(str(error))

    async with anyio.create_task_group() as tasks:
        for _ in range(12):
            tasks.start_soon(create)
    assert len(got) == 1 and len(refused) == 11
    assert [info.id for info in await runtime.list()] == [got[0].id]
    await got[0].start()


async def test_a_hostile_client_gets_nothing_else(runtime: RemoteRuntime, server: Process) -> None:
    """Not at another address, not a privileged port, not the server's, none beside the range, none twice."""
    for host_ip in ("0.0.0.0", "::", "127.0.0.3", "::1", "192.0.2.1"):
        with pytest.raises(UnsupportedError, match=rf"at an address that its operator has chosen, not at {host_ip}"):
            await runtime.create(IMAGE, ports=[tcp(host_ip=host_ip)])
    for port in (22, 80, 1023, server.port, FIRST - 1, LAST + 1, 65535):
        with pytest.raises(UnsupportedError, match=f"gives ports from {FIRST} to {LAST}, not {port}"):
            await runtime.create(IMAGE, ports=[tcp(port)])
    with pytest.raises(InvalidArgumentError, match=f"port {FIRST} is asked for twice"):
        await runtime.create(IMAGE, ports=[tcp(FIRST), tcp(FIRST)])
    for bad in ({"port": 0}, {"port": 65536}, {"port": 80, "host_port": -1}, {"port": 80, "protocol": "sctp"}):
        with pytest.raises(InvalidArgumentError):
            await runtime.create(IMAGE, ports=[PublishedPort(**bad)])
    assert await runtime.list() == []


async def test_nobody_has_more_ports_than_the_operator_gives(runtime: RemoteRuntime) -> None:
    """Boxes that do not run count, and copies."""
    box = await runtime.create(IMAGE, ports=[tcp()] * (MOST - 2))
    with pytest.raises(ResourceExhaustedError, match=f"at most {MOST} ports at once"):
        await runtime.create(IMAGE, ports=[tcp()] * 3)
    with pytest.raises(ResourceExhaustedError, match=f"at most {MOST} ports at once"):
        await box.clone()
    await runtime.create(IMAGE, ports=[tcp(), tcp(protocol="udp")])
    with pytest.raises(ResourceExhaustedError):
        await runtime.create(IMAGE, ports=[tcp()])
    await runtime.create(IMAGE)
    await box.remove()
    await runtime.create(IMAGE, ports=[tcp()] * (MOST - 2))


async def test_nor_do_many_who_race_for_them(runtime: RemoteRuntime) -> None:
    refused = []

    async def create() -> None:
        try:
            await runtime.create(IMAGE, ports=[tcp()])
        except ResourceExhaustedError as error:
            refused.append(error)

    async with anyio.create_task_group() as tasks:
        for _ in range(MOST + 6):
            tasks.start_soon(create)
    assert len(refused) == 6 and len(await runtime.list()) == MOST


async def test_a_copy_gets_ports_of_its_own(runtime: RemoteRuntime) -> None:
    box = await _echoes(runtime, tcp(FIRST + 3))
    copy = await box.clone()
    await copy.start()
    await _serve_echo(copy, 8080)
    (first,), (second,) = await _ports(box), await _ports(copy)
    assert first.host_port == FIRST + 3 and second.host_port not in (0, first.host_port)
    assert second.host_ip == ADDRESS and await _answers(first) and await _answers(second)


async def test_a_fork_gets_ports_of_its_own(runtime: RemoteRuntime, tmp_path: Path) -> None:
    """And a VM that has ports can be written to an archive while it runs."""
    box = await _echoes(runtime, tcp(FIRST + 4), isolation="vm")
    fork = await box.fork()
    (first,), (second,) = await _ports(box), await _ports(fork)
    assert first.host_port == FIRST + 4 and second.host_port not in (0, first.host_port)
    assert second.host_ip == ADDRESS and await _answers(first) and await _answers(second)
    await box.export(tmp_path / "archive")
    assert await _ports(await runtime.import_box(tmp_path / "archive")) == ()


async def test_ports_that_are_chosen_are_no_one_elses(elsewhere: Path) -> None:
    """Not those of boxes that do not run, nor of other programs. When none is left that is said."""
    options = ("--publish-address", ADDRESS, "--publish-ports", f"{FIRST}-{FIRST + 3}")
    with serving(elsewhere, *options) as process, socket.create_server((ADDRESS, FIRST + 1)):
        async with RemoteRuntime(process.url, TOKEN) as runtime:
            await runtime.create(IMAGE, ports=[tcp(FIRST + 2)], detach=True)
            boxes = [await runtime.create(IMAGE, ports=[tcp()], detach=True) for _ in range(3)]
            results: list[HutchError | None] = []

            async def start(box: RemoteBox) -> None:
                try:
                    await box.start()
                except HutchError as error:
                    results.append(error)
                else:
                    results.append(None)

            async with anyio.create_task_group() as tasks:
                for box in boxes:
                    tasks.start_soon(start, box)
            (failed,) = [error for error in results if error is not None]
            assert isinstance(failed, ResourceExhaustedError) and f"{FIRST} to {FIRST + 3}" in str(failed)
            chosen = {(await _ports(box))[0].host_port for box in boxes}
            assert chosen == {0, FIRST, FIRST + 3}


async def test_without_the_operators_word_there_are_none(elsewhere: Path) -> None:
    """Nor any more, when it is taken back; who looks after the machine itself is not bound by that, but a client cannot
    copy such a box."""
    wish = [tcp()]
    with serving(elsewhere, *PUBLISHING) as process:
        async with RemoteRuntime(process.url, TOKEN) as runtime:
            await (await runtime.create(IMAGE, ports=wish, name="before", detach=True)).start()
    async with LocalRuntime(elsewhere) as local:
        await local.create(IMAGE, ports=wish, name="own", detach=True)
    with serving(elsewhere) as process:
        async with RemoteRuntime(process.url, TOKEN) as runtime:
            with pytest.raises(UnsupportedError, match="its operator has to allow that, with --publish-address"):
                await runtime.create(IMAGE, ports=wish)
            before, own = await runtime.get("before"), await runtime.get("own")
            assert (await before.info()).state is BoxState.RUNNING
            await before.stop(timeout=0)
            with pytest.raises(UnsupportedError, match="--publish-address"):
                await before.start()
            await own.start()
            assert (await _ports(own))[0].host_ip == "127.0.0.1"
            with pytest.raises(UnsupportedError, match="--publish-address"):
                await own.clone()


async def test_the_address_of_now_holds_at_the_next_start(elsewhere: Path) -> None:
    with serving(elsewhere, "--publish-address", "0.0.0.0", "--publish-ports", f"{FIRST}-{LAST}") as process:
        async with RemoteRuntime(process.url, TOKEN) as runtime:
            box = await _echoes(runtime, tcp(), name="box", detach=True)
            (port,) = await _ports(box)
            assert port.host_ip == "0.0.0.0" and await _answers(port)
    with serving(elsewhere, *PUBLISHING) as process:
        async with RemoteRuntime(process.url, TOKEN) as runtime:
            box = await runtime.get("box")
            await box.stop(timeout=0)
            await box.start()
            await _serve_echo(box, 8080)
            (port,) = await _ports(box)
            assert port.host_ip == ADDRESS and await _answers(port)
            assert not await _answers(PublishedPort(port=8080, host_port=port.host_port))


def test_a_server_does_not_give_its_own_port_away(tmp_path: Path) -> None:
    """Nor does it start with bounds that cannot be."""
    port = free_port()
    for options, told in (
        (("--publish-ports", f"{port - 1}-{port}"), f"port {port} is the server's own"),
        (("--publish-ports", "80-2000"), "a range lies within 1024-65535"),
        (("--publish-ports", "3000-2000"), "a range lies within 1024-65535"),
        (("--publish-ports", "3000"), "is not a range of ports"),
        (("--publish-address", "192.0.2.1"), "--publish-address 192.0.2.1: ports of boxes cannot be published there"),
        (("--publish-address", "all"), "'all', at which ports are to be published, is not an address"),
        (("--max-published", "0"), "the number of published ports"),
        (("--max-send-rate", "1"), "the highest send rate"),
    ):
        command = ["-m", "hutch", "--home", str(tmp_path / "home"), "serve", "--port", str(port), "--api-key", TOKEN]
        both = ("--publish-address", ADDRESS) if "--publish-address" not in options else ()
        done = subprocess.run([sys.executable, *command, *both, *options], capture_output=True, text=True, timeout=30)
        assert done.returncode != 0 and told in done.stderr, done.stderr


async def test_a_creation_that_is_asked_for_again_has_its_port(runtime: RemoteRuntime) -> None:
    """As it is when its answer was lost."""
    box_id = new_id()
    for _ in range(2):
        assert (await runtime.create(IMAGE, ports=[tcp(FIRST + 5)], box_id=box_id)).id == box_id
    assert len(await runtime.list()) == 1
