"""The process that serves the doors: started when needed, gone with the last box, back when it was killed."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import NetworkError
from hutch.host import netns
from hutch.host.proc import poll_until
from hutch.runtime.runtime import LocalRuntime
from tests.net.conftest import IMAGE, call, gateways, get
from tests.net.world import GOOD, NOWHERE, OTHER

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from tests.net.world import World

pytestmark = pytest.mark.anyio


async def _only_gateway(home: Path) -> int:
    """The one gateway; a process that it has just started looks like it for a moment."""
    assert await poll_until(lambda: len(gateways(home)) == 1, 10)
    return gateways(home)[0]


async def _box(runtime: LocalRuntime, name: str = "box") -> LocalBox:
    box = await runtime.create(IMAGE, name=name, network=["good.test"], detach=True)
    await box.start()
    assert await get(box, GOOD, "good.test") == f"{GOOD} good.test /"
    return box


async def _reaches(box: LocalBox) -> bool:
    return await get(box, GOOD, "good.test") == f"{GOOD} good.test /"


async def test_one_gateway_serves_all_boxes_and_ends_with_the_last(
    runtime: LocalRuntime, home: Path, world: World
) -> None:
    boxes = [await _box(runtime, name) for name in ("one", "two", "three")]
    assert len(gateways(home)) == 1
    for box in boxes:
        await box.remove(force=True)
    assert await poll_until(lambda: not gateways(home) and not gateways(home, "hutch.host.keeper"), 20)
    assert not (home / "gateway.sock").exists()
    assert await _reaches(await _box(runtime))


async def test_without_a_network_there_is_none(runtime: LocalRuntime, home: Path, world: World) -> None:
    box = await runtime.create(IMAGE)
    await box.run("true")
    assert not gateways(home)


async def test_a_detached_box_keeps_its_door(home: Path, world: World) -> None:
    async with LocalRuntime(home) as runtime:
        box = await _box(runtime)
    gateway = await _only_gateway(home)
    async with LocalRuntime(home) as runtime:
        box = await runtime.get("box")
        assert await _reaches(box)
        assert gateways(home) == [gateway]
        await box.remove(force=True)


async def test_a_killed_gateway_comes_back_by_itself(runtime: LocalRuntime, home: Path, world: World) -> None:
    """Until then the box reaches nobody; afterwards its policy is the same."""
    box = await _box(runtime)
    caller = await call(box, GOOD, 80)
    gateway = await _only_gateway(home)
    os.kill(gateway, signal.SIGKILL)
    await caller.receive_all()
    await caller.close()
    assert await poll_until(lambda: gateways(home) not in ([], [gateway]), 20)
    with anyio.fail_after(20):
        while not await _reaches(box):
            await anyio.sleep(0.05)
    assert "no rule" in await get(box, OTHER, "other.test")
    assert len(gateways(home)) == 1


async def test_whoever_comes_next_brings_it_back(home: Path, world: World) -> None:
    """Both the gateway and its keeper were killed."""
    async with LocalRuntime(home) as runtime:
        await _box(runtime)
    for pid in gateways(home, "hutch.host.keeper") + gateways(home):
        os.kill(pid, signal.SIGKILL)
    assert await poll_until(lambda: not gateways(home), 10)
    async with LocalRuntime(home) as runtime:
        box = await runtime.get("box")
        assert await _reaches(box)
        await box.remove(force=True)


async def test_while_it_is_gone_a_hostile_box_gains_nothing(runtime: LocalRuntime, home: Path, world: World) -> None:
    """The box may take the ports of the gateway meanwhile: the next one takes others."""
    box = await runtime.create(IMAGE, network=["good.test"])
    await box.start()
    taken = "for p in $(awk 'NR > 1 && $4 == \"0A\" {print $2}' /proc/net/tcp | cut -d: -f2); do echo $((0x$p)); done"
    (port,) = (await box.run("sh", "-c", taken)).text.split()
    for pid in gateways(home, "hutch.host.keeper") + gateways(home):
        os.kill(pid, signal.SIGKILL)
    assert await poll_until(lambda: not gateways(home), 10)
    thief = await box.exec("sh", "-c", f"until talk echo {port} 2>/dev/null; do :; done")  # it ends by and by
    assert await anext(aiter(thief.stdout)) == b"listening\n"
    caller = await call(box, OTHER, 80)
    await caller.send(b"to myself")
    assert await caller.receive() == b"to myself"
    await caller.close()
    await box.network.update(allow=["good.test"])
    assert await _reaches(box)
    assert "no rule" in await get(box, OTHER, "other.test")
    await thief.kill()


async def test_a_box_that_is_killed_takes_its_door_along(runtime: LocalRuntime, home: Path, world: World) -> None:
    box = await _box(runtime)
    pid = (await box.info()).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert await poll_until(lambda: not gateways(home), 20)
    await box.start()
    assert await _reaches(box)


async def test_without_nft_a_network_is_refused_with_the_remedy(
    runtime: LocalRuntime, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netns, "nft", lambda: None)
    with pytest.raises(NetworkError, match=r"nft is not installed: install nftables"):
        await netns.open_door(os.pidfd_open(os.getpid()))


async def test_one_slow_peer_delays_nobody(runtime: LocalRuntime, world: World) -> None:
    held = threading.Event()

    def stall(connection: socket.socket) -> None:
        connection.recv(1)
        held.wait(30)

    server = world.serve(OTHER, 7001, stall)
    try:
        box = await runtime.create(IMAGE, network="enabled")
        await box.start()
        stuck = await box.exec("sh", "-c", f"head -c 50000000 /dev/zero | nc {OTHER} 7001")
        with anyio.fail_after(20):
            for _ in range(5):
                assert await get(box, GOOD, "x") == f"{GOOD} x /"
        await stuck.kill()
    finally:
        held.set()
        server.shutdown(socket.SHUT_RDWR)
        server.close()


async def test_a_peer_that_cannot_be_reached_is_told_and_logged(runtime: LocalRuntime, world: World) -> None:
    box = await runtime.create(IMAGE, network=[f"{GOOD}:81", NOWHERE])
    await box.start()
    assert await get(box, GOOD, "x", port=81) == ""
    (refusal,) = await box.network.log()
    assert refusal.reason == "it cannot be reached: Connection refused"


async def test_half_closed_connections_go_on(runtime: LocalRuntime, world: World) -> None:
    def late(connection: socket.socket) -> None:
        while connection.recv(65536):
            pass
        connection.sendall(b"after your end")

    server = world.serve(OTHER, 7002, late)
    try:
        box = await runtime.create(IMAGE, network="enabled")
        await box.start()
        caller = await call(box, OTHER, 7002)
        await caller.send(b"x" * 1000)
        await caller.end()
        assert await caller.receive_all() == b"after your end"
        await caller.close()
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
