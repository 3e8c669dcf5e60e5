"""Published UDP ports of a box."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest

from hutch.types import PublishedPort
from tests.net.conftest import IMAGE
from tests.net.test_gateway import _only_gateway
from tests.net.test_ports import _answers, _serve_echo

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.runtime import LocalRuntime
    from tests.net.world import World

pytestmark = pytest.mark.anyio


class _Client:
    """A UDP client of a port of the host."""

    def __init__(self, port: PublishedPort) -> None:
        family = socket.AF_INET6 if ":" in port.host_ip else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.connect((port.host_ip, port.host_port))

    async def ask(self, data: bytes) -> bytes:
        """Send a datagram until there is an answer: it may be lost while the box or the gateway starts."""
        with anyio.fail_after(20):
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    self.socket.send(data)
                with anyio.move_on_after(1):
                    await anyio.wait_readable(self.socket)
                with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                    return self.socket.recv(65536)


async def test_published_udp_ports(runtime: LocalRuntime, home: Path, world: World) -> None:
    """Each client has its own answers, whatever their sizes, also from the gateway that follows on a killed one."""
    box = await runtime.create(IMAGE, ports=[PublishedPort(port=8080, protocol="udp"), 8080])
    await box.start()
    await _serve_echo(box, 8080)
    port, stream = (await box.network.get()).ports
    assert port.protocol == "udp" and await _answers(stream)
    clients = [_Client(port) for _ in range(5)]
    with contextlib.ExitStack() as stack:
        for client in clients:
            stack.enter_context(client.socket)
        for size in (0, 1, 1500, 65507):
            for number, client in enumerate(clients):
                data = bytes([number]) * size
                assert await client.ask(data) == data
        stats = await box.stats()
        assert stats.network_sent_bytes is not None and stats.network_sent_bytes > 5 * 67_000
        os.kill(await _only_gateway(home), signal.SIGKILL)
        assert await clients[0].ask(b"again") == b"again"


async def test_clients_of_a_udp_port_are_bounded(runtime: LocalRuntime, world: World) -> None:
    """Those that are quiet for longest make room. Each has a process in the box, started by the agent."""
    box = await runtime.create(IMAGE, ports=[PublishedPort(port=8080, protocol="udp")], pids=100)
    await box.start()
    await _serve_echo(box, 8080)
    (port,) = (await box.network.get()).ports
    with contextlib.ExitStack() as stack:
        clients = [_Client(port) for _ in range(150)]
        for client in clients:
            stack.enter_context(client.socket)
        async with anyio.create_task_group() as tasks:
            for client in clients[:100]:
                client.socket.send(b"flood")
            for client in clients[100:110]:
                tasks.start_soon(client.ask, b"hello")
        # Not all processes: in a VM those of the kernel are among them.
        ways = (await box.run("sh", "-c", "cat /proc/[0-9]*/status | grep -cx 'PPid:.1'")).text
        assert 32 < int(ways) < 64 + 10


@pytest.mark.parametrize(
    ("everywhere", "asked"),
    [("0.0.0.0", ("127.0.0.1", "127.0.0.9")), ("::", ("::1", "::ffff:127.0.0.1", "::ffff:127.0.0.9"))],
)
async def test_an_answer_comes_from_the_address_that_was_asked(
    runtime: LocalRuntime, world: World, everywhere: str, asked: tuple[str, ...]
) -> None:
    """Also where the port is at every address of the host."""
    box = await runtime.create(IMAGE, ports=[PublishedPort(port=8080, protocol="udp", host_ip=everywhere)])
    await box.start()
    await _serve_echo(box, 8080)
    (port,) = (await box.network.get()).ports
    for address in asked:
        client = _Client(msgspec.structs.replace(port, host_ip=address))
        with client.socket:
            assert await client.ask(address.encode()) == address.encode()
