"""The remote SDK on bad networks, and over servers that are killed: the execution contract, section 3."""

from __future__ import annotations

import functools
import os
import random
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import HutchError, SessionReapedError, UpstreamUnavailableError
from hutch.sdk import remote_channel
from hutch.sdk.remote import RemoteRuntime
from hutch.sdk.remote_execution import ConnectionLostError
from tests.remote.conftest import TOKEN
from tests.remote.faultproxy import Fault, FaultProxy, random_cuts
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import Sink, in_time, sh, until

if TYPE_CHECKING:
    from hutch.sdk.remote_box import RemoteBox
    from tests.remote.processes import Process

pytestmark = [pytest.mark.root, pytest.mark.anyio]

LAST = 200_000


def _longer(sink: Sink, size: int) -> bool:
    return len(sink.data) > size


def numbers(last: int = LAST) -> bytes:
    """What ``seq 1 last`` writes."""
    return b"".join(b"%d\n" % n for n in range(1, last + 1))


async def test_census_with_random_cuts(server: Process, runtime: RemoteRuntime, box: RemoteBox) -> None:
    """Every output equals what was asked for: none lost, none doubled, none crossed, none hung."""
    count = int(os.environ.get("HUTCH_CENSUS", "300"))
    chance = random.Random(1)
    wrong: list[str] = []
    left = list(range(count))

    async def work(far: RemoteBox) -> None:
        while left:
            number = left.pop()
            lines = chance.choice([1, 10, 1000, 20_000])
            code = number % 50
            result = await far.run(
                *sh(f"echo {number} >> /ran; read x; seq {number} {number + lines}; echo $x >&2; exit {code}"),
                input=b"nonce %d\n" % number,
            )
            expected = b"".join(b"%d\n" % n for n in range(number, number + lines + 1))
            if (result.stdout, result.stderr, result.exit_code) != (expected, b"nonce %d\n" % number, code):
                wrong.append(f"{number}: {len(result.stdout)} of {len(expected)} bytes, {result.exit_code}")
            if result.truncated or result.dropped:
                wrong.append(f"{number}: truncated")

    async with FaultProxy(server.port, random_cuts(7, share=0.9)) as proxy, RemoteRuntime(proxy.url, TOKEN) as far:
        far_box = await far.get(box.id)
        with in_time(60):
            async with anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(work, far_box)
        assert proxy.faults > count // 10, "the census was not disturbed"
    assert wrong == []
    ran = sorted(int(line) for line in (await box.files.read("/ran")).split())
    assert ran == list(range(count)), "a command was run twice, or never"


@pytest.mark.parametrize("kind", ["cut", "reset"])
@pytest.mark.parametrize("after", [1, 150, 400, 5_000, 300_000])
async def test_each_connection_breaks_at_a_byte(server: Process, box: RemoteBox, kind: str, after: int) -> None:
    faults = [Fault(kind=kind, after=after)] * 3
    async with (
        FaultProxy(server.port, lambda: faults.pop() if faults and armed else Fault()) as proxy,
        RemoteRuntime(proxy.url, TOKEN) as far,
    ):
        armed = False
        far_box = await far.get(box.id)
        armed = True
        with in_time(30):
            result = await far_box.run(*sh(f"seq 1 {LAST}; echo err >&2; exit 41"))
        assert (result.stdout, result.stderr, result.exit_code) == (numbers(), b"err\n", 41)
        assert not result.truncated
        assert not faults or after > 5_000


async def test_single_bytes_and_latency(server: Process, box: RemoteBox) -> None:
    async with (
        FaultProxy(server.port, lambda: Fault(slice=1)) as proxy,
        RemoteRuntime(proxy.url, TOKEN) as far,
    ):
        with in_time(30):
            result = await (await far.get(box.id)).run(*sh("seq 1 2000; exit 5"), input=b"x" * 3000)
        assert (result.stdout, result.exit_code) == (numbers(2000), 5)


@pytest.mark.parametrize("kind", ["stall", "half-open"])
async def test_a_silent_peer_is_noticed(
    server: Process, box: RemoteBox, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_channel, "HEARTBEAT", 0.2)
    monkeypatch.setattr(remote_channel, "SILENCE", 1.0)
    armed = [False]

    def choose() -> Fault:
        return Fault(kind=kind, after=100_000) if armed[0] else Fault()

    async with FaultProxy(server.port, choose) as proxy, RemoteRuntime(proxy.url, TOKEN) as far:
        far_box = await far.get(box.id)
        sink = Sink()
        armed[0] = True
        execution = await far_box.exec(*sh(f"seq 1 {LAST}; exit 6"), stdout=sink)
        with in_time(30):
            await until(lambda: proxy.faults > 0)
            armed[0] = False
            result = await execution.wait()
        assert (bytes(sink.data), result.exit_code, result.truncated) == (numbers(), 6, False)


async def test_killing_the_server_in_mid_stream_loses_nothing(
    server: Process, runtime: RemoteRuntime, box: RemoteBox
) -> None:
    sink = Sink()
    script = f"echo run >> /runs; seq 1 {LAST}; read x; echo $x; seq 1 {LAST}; echo err >&2; exit 42"
    execution = await box.exec(*sh(script), stdin=True, stdout=sink)
    with in_time(40):
        for size in (1000, 500_000):
            await until(functools.partial(_longer, sink, size))
            server.kill()
            server.start()
        await execution.stdin.write(b"between\n")
        server.kill()
        server.start()
        result = await execution.wait()
    assert bytes(sink.data) == numbers() + b"between\n" + numbers()
    assert (result.exit_code, result.stderr, result.truncated) == (42, b"err\n", False)
    assert await box.files.read("/runs") == b"run\n"


async def test_a_main_command_that_ends_while_nobody_is_connected(server: Process, runtime: RemoteRuntime) -> None:
    job = await runtime.create(IMAGE, command=sh("read x; seq 1 5000; exit 43"), open_stdin=True)
    sink = Sink()
    execution = await job.start_attached(stdout=sink)
    with in_time(30):
        await execution.stdin.write(b"go\n")
        server.kill()
        await anyio.sleep(0.2)
        server.start()
        result = await execution.wait()
    assert (bytes(sink.data), result.exit_code, result.truncated) == (numbers(5000), 43, False)


async def test_at_the_end_of_the_budget_the_error_carries_what_had_come(server: Process, box: RemoteBox) -> None:
    async with RemoteRuntime(server.url, TOKEN, budget=0.5) as far:
        execution = await (await far.get(box.id)).exec(*sh("echo before; echo err >&2; sleep 60"))
        with in_time():
            task: list[BaseException] = []

            async def wait() -> None:
                try:
                    await execution.wait()
                except UpstreamUnavailableError as error:
                    task.append(error)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await until(lambda: bool(execution._collected(1) and execution._collected(2)))
                server.kill()
        assert isinstance(task[0], ConnectionLostError)
        assert (task[0].stdout, task[0].stderr, task[0].exit_code) == (b"before\n", b"err\n", None)
    server.start()


async def test_what_never_was_is_not_found_and_what_was_released_is_reaped(box: RemoteBox) -> None:
    execution = await box.exec("true")
    execution.forget = True
    with in_time():
        await execution.wait()

        async def reaped() -> bool:
            try:
                await (await box.attach(execution.id)).close()
            except SessionReapedError:
                return True
            return False

        await until(reaped)
        for unknown in ("zzzzzzzzzzzz", "main", "not an id", "../../../etc/passwd", "", "x" * 500):
            with pytest.raises(HutchError, match="no"):
                await box.attach(unknown)
