"""Ports of a box, from outside: tunnels, forwarded and published ports."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import HutchError, InvalidArgumentError, NetworkError
from hutch.runtime.runtime import LocalRuntime
from hutch.types import PublishedPort
from tests.net.conftest import IMAGE
from tests.net.test_gateway import _only_gateway

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.sdk.base import Box
    from tests.net.world import World

pytestmark = pytest.mark.anyio


async def _serve_echo(box: Box, port: int) -> None:
    server = await box.exec("talk", "echo", str(port))
    with anyio.fail_after(10):
        assert await anext(aiter(server.stdout)) == b"listening\n"


@pytest.fixture
async def box(runtime: LocalRuntime) -> LocalBox:
    """A box without a network, with echo servers at 8080 and 8081."""
    box = await runtime.create(IMAGE)
    for port in (8080, 8081):
        await _serve_echo(box, port)
    return box


async def test_a_tunnel_carries_bytes_both_ways(box: LocalBox) -> None:
    data = os.urandom(3 << 20)
    async with await box.ports.connect(8080) as tunnel, anyio.create_task_group() as tasks:

        async def send() -> None:
            await tunnel.send(data)
            await tunnel.end()

        tasks.start_soon(send)
        received = bytearray()
        with anyio.fail_after(30):
            while piece := await tunnel.receive():
                received += piece
        assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()


async def test_nobody_listens(box: LocalBox) -> None:
    with pytest.raises(NetworkError, match=r"port 99 of box .* cannot be reached: Connection refused"):
        await box.ports.connect(99)
    for port in (0, 65536, "80", True):
        with pytest.raises(InvalidArgumentError):
            await box.ports.connect(port)  # type: ignore[arg-type]


async def test_many_tunnels_at_once(box: LocalBox) -> None:
    async def one(number: int) -> None:
        async with await box.ports.connect(8080 + number % 2) as tunnel:
            await tunnel.send(b"%d" % number)
            await tunnel.end()
            data = b""
            while piece := await tunnel.receive():
                data += piece
            assert data == b"%d" % number

    with anyio.fail_after(50):
        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(one, number)


async def test_a_tunnel_ends_with_the_box(box: LocalBox) -> None:
    tunnel = await box.ports.connect(8080)
    await tunnel.send(b"x")
    assert await tunnel.receive() == b"x"
    await box.stop(timeout=0)
    with anyio.fail_after(10):
        with contextlib.suppress(HutchError):
            assert await tunnel.receive() == b""
    await tunnel.close()


async def test_a_forwarded_port(box: LocalBox) -> None:
    async with await box.ports.forward(8080) as forward:
        assert forward.host_ip == "127.0.0.1"
        for _ in range(3):
            async with await anyio.connect_tcp(forward.host_ip, forward.host_port) as stream:
                await stream.send(b"over the port")
                assert await stream.receive() == b"over the port"
        with pytest.raises(NetworkError, match="Address already in use"):
            await box.ports.forward(8081, host_port=forward.host_port)
    with pytest.raises(OSError):
        await anyio.connect_tcp(forward.host_ip, forward.host_port)


async def _answers(port: PublishedPort) -> bool:
    try:
        async with await anyio.connect_tcp(port.host_ip, port.host_port) as stream:
            await stream.send(b"published")
            return await stream.receive() == b"published"
    except (OSError, anyio.EndOfStream, anyio.BrokenResourceError):
        return False


async def test_published_ports_outlive_their_maker_and_a_killed_gateway(home: Path, world: World) -> None:
    async with LocalRuntime(home) as runtime:
        box = await runtime.create(IMAGE, name="web", ports=[8080], detach=True)
        await box.start()
        await _serve_echo(box, 8080)
        (port,) = (await box.network.get()).ports
    assert port.host_port > 0 and await _answers(port)
    gateway = await _only_gateway(home)
    os.kill(gateway, signal.SIGKILL)
    with anyio.fail_after(20):
        while not await _answers(port):
            await anyio.sleep(0.05)
    async with LocalRuntime(home) as runtime:
        await runtime.remove("web", force=True)
    assert not await _answers(port)


async def test_a_port_that_is_taken_is_an_error_of_the_start(runtime: LocalRuntime) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        box = await runtime.create(IMAGE, ports=[PublishedPort(port=80, host_port=port)])
        with pytest.raises(NetworkError, match=rf"port {port} of 127.0.0.1 cannot be had"):
            await box.start()
        assert not (await box.info()).pid
    await box.start()
    assert (await box.info()).pid
