"""What the operator of a runner gives boxes of its network, through the API."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import AlreadyExistsError, UnsupportedError
from hutch.runtime.runtime import LocalRuntime
from hutch.sdk.remote import RemoteRuntime
from hutch.types import PublishedPort
from tests.e2e.fleet import KEY, api_process, joined, runner_process, shared_home
from tests.net.conftest import IMAGE, image_store
from tests.net.test_ports import _answers, _serve_echo
from tests.net.test_udp_ports import _Client
from tests.remote.processes import free_ports

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.anyio]

__all__ = ["image_store"]

FIRST = free_ports(100)
LAST = FIRST + 99
RANGE = ("--publish-ports", f"{FIRST}-{LAST}")


@pytest.fixture
async def homes(tmp_path: Path, image_store: Path) -> AsyncIterator[list[Path]]:
    """Homes for two runners. Nothing of their boxes is left afterwards."""
    homes = []
    for name in ("one", "another"):
        (tmp_path / name).mkdir()
        homes.append(shared_home(tmp_path / name, image_store))
    yield homes
    for home in homes:
        async with LocalRuntime(home) as runtime:
            for info in await runtime.list():
                await runtime.remove(info.id, force=True)


async def test_clients_are_told_the_address_of_the_runner(tmp_path: Path, homes: list[Path]) -> None:
    """Also after the API was killed; the rates are the runner's, too."""
    host = "127.0.0.5"
    options = ("--host", host, "--publish-address", "0.0.0.0", *RANGE, "--max-send-rate", "1m")
    with api_process(tmp_path) as api, runner_process(api, homes[0], *options):
        async with RemoteRuntime(api.url, KEY) as runtime:
            await joined(runtime)
            wishes = [PublishedPort(port=8080), PublishedPort(port=8080, host_port=FIRST, protocol="udp")]
            box = await runtime.create(IMAGE, ports=wishes, name="web", detach=True)
            await box.start()
            await _serve_echo(box, 8080)
            stream, datagrams = (await box.network.get()).ports
            assert stream.host_ip == datagrams.host_ip == host
            assert FIRST <= stream.host_port <= LAST and datagrams.host_port == FIRST
            assert await _answers(stream)
            client = _Client(datagrams)
            with client.socket:
                assert await client.ask(b"by datagram") == b"by datagram"

            assert (await box.network.update("disabled")).ports == (stream, datagrams)
            assert (await box.network.limit()).send_rate == 1 << 20
            with pytest.raises(UnsupportedError, match="send_rate"):
                await box.network.limit(send_rate=2 << 20)
            with pytest.raises(AlreadyExistsError, match=f"udp port {FIRST} is taken"):
                await runtime.create(IMAGE, ports=[PublishedPort(port=53, host_port=FIRST, protocol="udp")])
            with pytest.raises(UnsupportedError, match=r"not at 0\.0\.0\.0"):
                await runtime.create(IMAGE, ports=[PublishedPort(port=80, host_ip="0.0.0.0")])
            api.kill()
            assert await _answers(stream)
            api.start()
            await joined(runtime)
            assert [info.network.ports for info in await runtime.list()] == [(stream, datagrams)]
            await runtime.remove("web", force=True)
            assert not await _answers(stream)


async def test_boxes_with_ports_come_to_runners_that_publish(tmp_path: Path, homes: list[Path]) -> None:
    with api_process(tmp_path) as api, runner_process(api, homes[0]):
        async with RemoteRuntime(api.url, KEY) as runtime:
            await joined(runtime)
            with pytest.raises(UnsupportedError, match="its operator has to allow that, with --publish-address"):
                await runtime.create(IMAGE, ports=[80])
            await runtime.create(IMAGE)
            with runner_process(api, homes[1], "--publish-address", "127.0.0.2", *RANGE):
                await joined(runtime, 2)
                boxes = [await runtime.create(IMAGE, ports=[8080]) for _ in range(3)]
                async with anyio.create_task_group() as tasks:
                    for box in boxes:
                        tasks.start_soon(box.start)
                ports = [(await box.network.get()).ports[0] for box in boxes]
                assert {port.host_ip for port in ports} == {"127.0.0.2"}
                assert len({port.host_port for port in ports}) == 3
