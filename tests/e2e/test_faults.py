"""Bad networks in both hops: between client and API, and between API and runner."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.sdk import remote_channel
from hutch.sdk.remote import RemoteRuntime
from tests.e2e.fleet import KEY, Chain
from tests.remote.faultproxy import Fault, FaultProxy
from tests.remote.test_faults import numbers
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import Sink, in_time, sh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hutch.sdk.remote_box import RemoteBox

pytestmark = [pytest.mark.root, pytest.mark.anyio]

LAST = 60_000


@pytest.fixture
async def far(chain: Chain) -> AsyncIterator[RemoteBox]:
    """A running box at the far end of the chain."""
    async with RemoteRuntime(chain.front.url, KEY) as runtime:
        box = await runtime.create(IMAGE)
        await box.start()
        yield box
        chain.front.choose = chain.back.choose = Fault
        await box.remove(force=True)


def hop(chain: Chain, name: str) -> FaultProxy:
    """One of the two, which breaks all connections that it has."""
    proxy: FaultProxy = getattr(chain, name)
    return proxy


async def test_breaks_at_every_stage(chain: Chain, far: RemoteBox) -> None:
    """In each hop, at bytes within the handshake, the first frames and the output."""
    for name in ("front", "back"):
        proxy = hop(chain, name)
        for kind in ("cut", "reset"):
            for after in (1, 150, 400, 5_000, 200_000):
                faults = [Fault(kind=kind, after=after)] * 2
                proxy.choose = lambda faults=faults: faults.pop() if faults else Fault()  # type: ignore[misc]
                proxy.cut_all()
                with in_time(30):
                    result = await far.run(*sh(f"cat; seq 1 {LAST}; echo err >&2; exit 41"), input=b"in\n")
                assert result.stdout == b"in\n" + numbers(LAST), (name, kind, after)
                assert (result.stderr, result.exit_code, result.truncated) == (b"err\n", 41, False)
                assert not faults or after > 5_000


async def test_single_bytes_and_latency_in_both_hops(chain: Chain, far: RemoteBox) -> None:
    for fault in (Fault(slice=1), Fault(latency=0.02)):
        chain.front.choose = chain.back.choose = lambda fault=fault: fault  # type: ignore[misc]
        chain.front.cut_all()
        chain.back.cut_all()
        with in_time(30):
            result = await far.run(*sh("cat; seq 1 1000; exit 5"), input=b"x" * 2000)
        assert (result.stdout, result.exit_code) == (b"x" * 2000 + numbers(1000), 5)


@pytest.mark.parametrize("kind", ["stall", "half-open"])
@pytest.mark.parametrize("name", ["front", "back"])
async def test_a_silent_hop_is_noticed(
    chain: Chain, far: RemoteBox, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_channel, "HEARTBEAT", 0.2)
    monkeypatch.setattr(remote_channel, "SILENCE", 1.0)
    proxy = hop(chain, name)
    faults = [Fault(), Fault(kind=kind, after=100_000)]  # the request; the connection that watches
    proxy.choose = lambda: faults.pop(0) if faults else Fault()
    proxy.cut_all()
    sink = Sink()
    with in_time(30):
        execution = await far.exec(*sh(f"seq 1 {LAST}; exit 6"), stdout=sink)
        result = await execution.wait()
    assert proxy.faults == 1
    assert (bytes(sink.data), result.exit_code, result.truncated) == (numbers(LAST), 6, False)


async def test_3_4_a_start_survives_a_break_behind_the_api(chain: Chain, far: RemoteBox) -> None:
    """It lasts longer than the API tries by itself: what the API then answers is not the last word."""
    broken = anyio.current_time() + 2.0
    chain.back.choose = lambda: Fault(after=1) if anyio.current_time() < broken else Fault()
    chain.back.cut_all()
    with in_time(20):
        result = await far.run(*sh("echo run >> /runs; exit 3"))
    assert anyio.current_time() > broken
    assert result.exit_code == 3
    assert await far.files.read("/runs") == b"run\n"
