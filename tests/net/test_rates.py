"""Limits of speed: with and without, in both directions, shared by all that a box does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest

from hutch.errors import InvalidArgumentError
from hutch.types import NetPolicy, Outbound, PublishedPort
from tests.net.conftest import IMAGE
from tests.net.world import GOOD

if TYPE_CHECKING:
    from hutch.runtime.runtime import LocalRuntime
    from hutch.sdk.base import Box
    from tests.net.world import World

pytestmark = pytest.mark.anyio

_RATE = 500_000
_SIZE = 1_000_000
# What may pass at once before the limit is felt.
_BURST = 1 << 16
_SECONDS = (_SIZE - _BURST) / _RATE


async def _echoed(box: Box, size: int = _SIZE) -> float:
    """Send bytes to the echo server and take them back; returns the seconds."""
    began = time.perf_counter()
    done = await box.run("sh", "-c", f"head -c {size} /dev/zero | nc {GOOD} 7777 | wc -c", timeout=60)
    assert int(done.text) == size, done.stderr
    return time.perf_counter() - began


@pytest.mark.parametrize("direction", ["send_rate", "receive_rate"])
async def test_a_limit_holds(runtime: LocalRuntime, world: World, direction: str) -> None:
    """And can be changed while the box runs. Without one the same takes a fraction of the time."""
    policy = msgspec.structs.replace(NetPolicy(outbound=Outbound.ENABLED), **{direction: _RATE})
    box = await runtime.create(IMAGE, network=policy)
    assert (await box.network.get()) == policy
    assert _SECONDS * 0.9 < await _echoed(box) < _SECONDS * 3
    await box.network.limit()
    assert await _echoed(box) < _SECONDS / 2
    await box.network.limit(**{direction: 10 * _RATE})
    assert await _echoed(box, 10 * _SIZE) > _SECONDS * 0.9
    stats = await box.stats()
    assert stats.network_sent_bytes == stats.network_received_bytes == 12 * _SIZE


async def test_connections_share_the_limit(runtime: LocalRuntime, world: World) -> None:
    box = await runtime.create(IMAGE, network=NetPolicy(outbound=Outbound.ENABLED, receive_rate=_RATE))
    await box.start()
    began = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(_echoed, box, _SIZE // 4)
    assert time.perf_counter() - began > _SECONDS * 0.9


async def test_another_box_is_not_slowed_down(runtime: LocalRuntime, world: World) -> None:
    slow, quick = [
        await runtime.create(IMAGE, network=NetPolicy(outbound=Outbound.ENABLED, send_rate=rate))
        for rate in (2048, None)
    ]
    await slow.start()
    held = await slow.exec("sh", "-c", f"nc {GOOD} 7777 </dev/zero >/dev/null")
    assert await _echoed(quick) < _SECONDS
    await held.kill()
    await held.wait()


async def test_a_new_limit_holds_for_what_waits(runtime: LocalRuntime, world: World) -> None:
    """At 2 kB/s the transfer would take minutes."""
    box = await runtime.create(IMAGE, network=NetPolicy(outbound=Outbound.ENABLED, send_rate=2048))
    await box.start()
    async with anyio.create_task_group() as tasks:
        with anyio.fail_after(20):
            tasks.start_soon(_echoed, box)
            while not (await box.stats()).network_sent_bytes:
                await anyio.sleep(0.05)
            await box.network.limit()


async def test_datagrams_beyond_the_limit_are_lost(runtime: LocalRuntime, world: World) -> None:
    box = await runtime.create(IMAGE, network=NetPolicy(outbound=Outbound.ENABLED, send_rate=20_000))

    async def send(seconds: int) -> None:
        one = f"dd if=/dev/zero bs=4000 count=1 2>/dev/null | talk udp {GOOD} 9999 {seconds}"
        await box.run("sh", "-c", f"i=0; while [ $i -lt 50 ]; do {one}; i=$((i+1)); done", timeout=60)

    await send(0)  # without waiting for answers
    sent = (await box.stats()).network_sent_bytes
    assert sent is not None and 0 < sent < 150_000
    await box.network.limit()
    await send(10)
    assert (await box.stats()).network_sent_bytes == sent + 200_000


async def test_published_ports_are_limited_and_counted(runtime: LocalRuntime, world: World) -> None:
    policy = NetPolicy(ports=(PublishedPort(port=80),), send_rate=_RATE)
    box = await runtime.create(IMAGE, command=["talk", "echo", "80"], network=policy)
    await box.start()
    (port,) = (await box.network.get()).ports
    began = time.perf_counter()
    async with await anyio.connect_tcp(port.host_ip, port.host_port) as connection, anyio.create_task_group() as tasks:
        tasks.start_soon(connection.send, bytes(_SIZE))
        received = 0
        with anyio.fail_after(30):
            while received < _SIZE:
                received += len(await connection.receive())
    assert time.perf_counter() - began > _SECONDS * 0.9
    stats = await box.stats()
    assert stats.network_sent_bytes == stats.network_received_bytes == _SIZE


@pytest.mark.parametrize("rate", [0, -1, 1.5, 1 << 50, "fast"])
async def test_rates_that_are_none(runtime: LocalRuntime, world: World, rate: object) -> None:
    box = await runtime.create(IMAGE)
    with pytest.raises(InvalidArgumentError, match="rate"):
        await box.network.limit(send_rate=rate)  # type: ignore[arg-type]
