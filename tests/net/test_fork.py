"""The fork of a box that has a network: what it shares with the first box, and what is its own."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
from typing import TYPE_CHECKING

import pytest

from hutch.types import PublishedPort, Secret
from tests.net.conftest import IMAGE, Caller, get, get_tls
from tests.net.test_gateway import _only_gateway
from tests.net.world import GOOD, OTHER
from tests.runtime.helpers import in_time, sh, until

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from tests.net.world import World

pytestmark = pytest.mark.anyio

SLOW = 2.5
SECRET = Secret(name="API_KEY", value="tr3asure-9b1f6c", hosts=("good.test",))


async def _says(connection: socket.socket, text: bytes) -> bool:
    """Whether the echo at the other end answers."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, text)
    with in_time():
        return await loop.sock_recv(connection, 100) == text


async def _reach(box: LocalBox) -> socket.socket:
    (published,) = (await box.network.get()).ports
    connection = socket.socket()
    connection.setblocking(False)
    with in_time():
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", published.host_port))
    return connection


async def _fork_slowly(parent: LocalBox, runtime: LocalRuntime) -> LocalBox:
    """With a gateway that takes its time."""

    def starting() -> bool:
        return any(record.spec.name == "child" and record.state == "paused" for record in runtime.store.list_boxes())

    gateway = await _only_gateway(runtime.home.root)
    os.kill(gateway, signal.SIGSTOP)
    forking = asyncio.ensure_future(parent.fork("child"))
    try:
        await until(starting, 40)
        await asyncio.sleep(SLOW)  # nothing happens, which gives no event
    finally:
        os.kill(gateway, signal.SIGCONT)
    with in_time():
        return await forking


async def _longest_pause(box: LocalBox) -> float:
    """Between two turns of a loop, in seconds."""
    times = [float(line.split()[0]) for line in (await box.run("cat", "/dev/shm/ticks")).text.splitlines()]
    return max(later - earlier for earlier, later in itertools.pairwise(times))


@pytest.mark.timeout(120)
async def test_a_fork_has_a_network_of_its_own(
    runtime: LocalRuntime, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections have ended, those of the first box go on; it has the same policy and placeholders, other ports
    of the host, and its own account."""
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))
    with socket.create_server(("127.0.0.1", 0)) as free:
        wanted = PublishedPort(port=8080, host_port=free.getsockname()[1])
    parent = await runtime.create(IMAGE, isolation="vm", network=[GOOD], ports=[wanted], secrets=[SECRET])
    server = await parent.exec("talk", "echo", "8080")
    with in_time():
        assert await anext(aiter(server.stdout)) == b"listening\n"
    # Nothing but the cut tells it of its end: it only reads. Then it comes back at once.
    outward = await parent.exec(*sh(f"nc {GOOD} 7777; nc {GOOD} 7777 </dev/null && echo again"), stdin=True)
    caller = Caller(outward)
    await caller.send(b"one\n")
    assert await caller.receive() == b"one\n"
    local = await parent.exec("nc", "127.0.0.1", "8080", stdin=True)
    inside = Caller(local)
    await inside.send(b"one\n")
    assert await inside.receive() == b"one\n"
    await parent.exec(*sh("while cat /proc/uptime; do sleep 0.05; done > /dev/shm/ticks"))
    asked = await parent.exec(*sh("read go; echo $API_KEY"), stdin=True)
    with await _reach(parent) as first:
        assert await _says(first, b"one\n")
        child = await _fork_slowly(parent, runtime)
        # Nothing has run there before it had its network. A translated guest's clock is not exact.
        assert await _longest_pause(child) > SLOW * 0.8
        assert (await child.stats()).network_received_bytes == 0
        assert (await parent.stats()).network_received_bytes
        twins = {each.id: await child.attach(each.id) for each in (outward, local, asked)}
        with in_time():
            assert (await twins[outward.id].wait()).stdout == b"one\nagain\n"
        await caller.send(b"two\n")
        assert await caller.receive() == b"two\n"
        assert await _says(first, b"two\n")
    # What is between two programs of the box is in both boxes; what came in by the published port is not.
    await twins[local.id].stdin.write(b"two\n")
    chunks = aiter(twins[local.id].stdout)
    with in_time():
        while b"two\n" not in await anext(chunks):
            pass
    await until(lambda: _open(child, 2))
    ports = [(await box.network.get()).ports[0] for box in (parent, child)]
    assert ports[0] == wanted and ports[1].port == 8080 and ports[1].host_port not in (0, wanted.host_port)
    with await _reach(child) as second:
        assert await _says(second, b"three\n")
    await twins[asked.id].stdin.write(b"\n")
    assert (await twins[asked.id].wait()).stdout == b"<HUTCH_SECRET:API_KEY>\n"
    await child.files.get("/etc/ssl/certs/ca-certificates.crt", tmp_path / "ca.pem")
    more = "X-Key: <HUTCH_SECRET:API_KEY>\r\n"
    assert await get_tls(child, GOOD, "good.test", tmp_path / "ca.pem", more=more)
    assert SECRET.value in world.requests[-1]
    assert await get(child, OTHER, "other.test") == ""
    assert len(await child.network.log()) == 1 and await parent.network.log() == []
    await child.network.update("disabled")
    assert await get(parent, GOOD, "x") == f"{GOOD} x /"
    await parent.remove(force=True)
    await child.network.update("enabled")
    assert await get(child, OTHER, "x") == f"{OTHER} x /"


async def _open(box: LocalBox, count: int) -> bool:
    """Whether so many ends of connections are open in the box."""
    return (await box.run(*sh("cat /proc/net/tcp /proc/net/tcp6 | grep -c ' 01 '"))).text == f"{count}\n"
