"""The highest rates that an operator gives boxes, at a server in the small internet."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import httpx2
import msgspec
import pytest

from hutch.errors import UnsupportedError
from hutch.sdk.remote import RemoteRuntime
from hutch.types import NetPolicy, Outbound
from tests.net.conftest import IMAGE, image_store, internet, world
from tests.net.test_rates import _RATE, _SECONDS, _SIZE, _echoed
from tests.remote.conftest import TOKEN, serving, shared_home

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hutch.sdk.remote_box import RemoteBox
    from tests.net.world import World
    from tests.remote.processes import Process

pytestmark = [pytest.mark.root, pytest.mark.anyio]

__all__ = ["image_store", "internet", "world"]

LIMITED = ("--max-send-rate", str(_RATE), "--max-receive-rate", "2m")
_FAST = 2 << 20


@pytest.fixture
def home(tmp_path: Path, image_store: Path, vm_store: Path) -> Path:
    """A home for several servers, one after the other."""
    home = shared_home(tmp_path, image_store)
    (home / "vm").symlink_to(vm_store)
    return home


def described(process: Process, path: str) -> Any:
    """What the server says to any client."""
    with httpx2.Client(base_url=process.url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False) as http:
        return http.get(path).json()


@contextlib.asynccontextmanager
async def served(home: Path, *options: str) -> AsyncIterator[tuple[RemoteRuntime, Process]]:
    """A server that gives boxes what the options say, and its runtime."""
    with serving(home, *options) as process:
        async with RemoteRuntime(process.url, TOKEN) as runtime:
            yield runtime, process


async def _rates(box: RemoteBox) -> tuple[int | None, int | None]:
    network = await box.network.get()
    return network.send_rate, network.receive_rate


@pytest.fixture
async def empty(home: Path) -> AsyncIterator[None]:
    """Nothing of the home's boxes is left afterwards."""
    yield
    async with served(home) as (runtime, _):
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)


async def test_who_asks_for_none_gets_the_operators(home: Path, world: World, empty: None) -> None:
    """Who asks for less gets that, and who asks for more is told how much there is; also later, of a box that runs."""
    async with served(home, *LIMITED) as (runtime, process):
        box = await runtime.create(IMAGE, network="enabled", name="box")
        assert await _rates(box) == (_RATE, _FAST)
        assert _SECONDS * 0.9 < await _echoed(box) < _SECONDS * 3

        for more in ({"send_rate": _RATE + 1}, {"receive_rate": _FAST + 1}):
            (what,) = more
            wish = msgspec.structs.replace(NetPolicy(outbound=Outbound.ENABLED), **more)
            with pytest.raises(UnsupportedError, match=rf"{what}: .* at most {more[what] - 1} bytes a second"):
                await runtime.create(IMAGE, network=wish)
            with pytest.raises(UnsupportedError, match=rf"{what}: .* at most {more[what] - 1} bytes a second"):
                await box.network.limit(**more)
        assert [info.name for info in await runtime.list()] == ["box"]

        changed = await box.network.limit(send_rate=_RATE // 2)
        assert (changed.send_rate, changed.receive_rate) == (_RATE // 2, _FAST)
        assert await _echoed(box, _SIZE // 2) > _SECONDS * 0.8
        await box.network.limit()  # no limit of its own
        await box.network.update("enabled")
        assert await _rates(box) == (_RATE, _FAST)
        assert await _echoed(box) > _SECONDS * 0.9

        own = await runtime.create(IMAGE, network=NetPolicy(outbound=Outbound.ENABLED, send_rate=2048))
        assert await _rates(own) == (2048, _FAST)
        assert await _rates(await own.clone()) == (2048, _FAST)
        network = described(process, f"/v1/boxes/{own.id}")["network"]
        assert (network["send_rate"], network["receive_rate"]) == (2048, _FAST)


@pytest.mark.parametrize("isolation", ["container", "vm"])
async def test_what_passes_is_limited_and_counted(home: Path, world: World, empty: None, isolation: str) -> None:
    async with served(home, *LIMITED) as (runtime, process):
        box = await runtime.create(IMAGE, network="enabled", isolation=isolation)
        await box.start()
        assert await _echoed(box) > _SECONDS * 0.9
        stats = await box.stats()
        assert (stats.network_sent_bytes, stats.network_received_bytes, stats.network_connections) == (_SIZE, _SIZE, 1)
        metrics = described(process, f"/v1/boxes/{box.id}/metrics")
        assert metrics["network_bytes_sent"] == metrics["network_bytes_received"] == _SIZE
        assert metrics["network_tcp_connections"] == 1


async def test_a_box_from_before_gets_them_at_its_next_start(home: Path, world: World, empty: None) -> None:
    async with served(home) as (runtime, _):
        box = await runtime.create(IMAGE, network="enabled", name="before", detach=True)
        await box.start()
        assert await _echoed(box) < _SECONDS * 0.9
        assert await _rates(box) == (None, None)
    async with served(home, *LIMITED) as (runtime, _):
        box = await runtime.get("before")
        assert await _rates(box) == (None, None)  # it runs as it was started
        await box.stop(timeout=0)
        await box.start()
        assert await _rates(box) == (_RATE, _FAST)
        assert await _echoed(box) > _SECONDS * 0.9
    async with served(home) as (runtime, _):
        box = await runtime.get("before")
        assert await _rates(box) == (_RATE, _FAST)
        await box.stop(timeout=0)
        await box.start()
        assert await _rates(box) == (None, None)


async def test_a_change_of_a_box_that_runs_brings_them(home: Path, world: World, empty: None) -> None:
    """Whatever is changed."""
    async with served(home) as (runtime, _):
        await (await runtime.create(IMAGE, network="enabled", name="before", detach=True)).start()
    async with served(home, *LIMITED) as (runtime, _):
        box = await runtime.get("before")
        with pytest.raises(UnsupportedError, match="send_rate"):
            await box.network.limit(send_rate=10 * _RATE)
        await box.network.update("enabled")
        assert await _rates(box) == (_RATE, _FAST)
        assert await _echoed(box) > _SECONDS * 0.9
