"""Output that the relay reads from the agent's shared memory: more than a window of it, whole and in order."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hutch.sdk.remote import RemoteRuntime
from tests.remote.conftest import TOKEN
from tests.remote.faultproxy import Fault, FaultProxy
from tests.remote.test_faults import numbers
from tests.runtime.helpers import Sink, in_time, sh, until

if TYPE_CHECKING:
    from hutch.sdk.remote_box import RemoteBox
    from tests.remote.processes import Process

pytestmark = [pytest.mark.root, pytest.mark.anyio]

MIB = 1 << 20
LAST = 1_500_000


class Digest:
    """A sink that keeps no more than a digest."""

    def __init__(self) -> None:
        self.size = 0
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.size += len(data)
        self._hash.update(data)

    def is_of(self, data: bytes) -> bool:
        """Whether it got these bytes."""
        return (self.size, self._hash.digest()) == (len(data), hashlib.sha256(data).digest())


def windows(server: Process) -> int:
    """How many windows the server has mapped."""
    return Path(f"/proc/{server.pid}/maps").read_text().count("/memfd:window")


async def test_a_busy_stream_comes_through_shared_memory_and_a_slow_reader_of_it_holds_up_nothing(
    server: Process, box: RemoteBox
) -> None:
    sink, errors, whole = Sink(shut=True), Digest(), numbers(LAST)
    script = f"seq 1 {LAST} >&2 & seq 1 {LAST}; wait; exit 5"
    with in_time(60):
        execution = await box.exec(*sh(script), stdout=sink, stderr=errors)
        await until(lambda: errors.size == len(whole), 30)
        assert len(sink.data) == 0
        sink.open()
        await until(lambda: len(sink.data) > 3 * MIB)
        assert windows(server) == 2
        result = await execution.wait()
    assert errors.is_of(whole)
    assert (bytes(sink.data), result.exit_code, result.truncated) == (whole, 5, False)
    with in_time(30):
        for number in range(3):  # further commands on the connection
            further = Digest()
            execution = await box.exec(*sh(f"seq 1 {LAST}; exit {number}"), stdout=further)
            assert (await execution.wait()).exit_code == number
            assert further.is_of(whole)
    await until(lambda: windows(server) <= 1)  # that of the last one, whose connection waits for the next


@pytest.mark.parametrize("kind", ["cut", "reset"])
async def test_cuts_while_output_comes_through_shared_memory_lose_nothing(
    server: Process, box: RemoteBox, kind: str
) -> None:
    """Each connection breaks after more than the relay reads in frames, at places of all kinds."""
    faults = [Fault(kind=kind, after=2 * MIB + extra) for extra in (1, 5_000, 262_150, 524_300)]
    async with (
        FaultProxy(server.port, lambda: faults.pop() if faults and armed else Fault()) as proxy,
        RemoteRuntime(proxy.url, TOKEN) as far,
    ):
        armed = False
        far_box = await far.get(box.id)
        armed = True
        sink = Digest()
        with in_time(60):
            execution = await far_box.exec(*sh(f"seq 1 {LAST}; exit 6"), stdout=sink)
            result = await execution.wait()
    assert not faults
    assert sink.is_of(numbers(LAST))
    assert (result.exit_code, result.truncated) == (6, False)


async def test_watchers_of_one_execution_get_the_same_and_one_that_is_cut_off_is_told_what_it_missed(
    server: Process, box: RemoteBox
) -> None:
    whole = numbers(LAST)
    async with FaultProxy(server.port) as proxy, RemoteRuntime(proxy.url, TOKEN) as far:
        first, second, third = Digest(), Sink(shut=True), Digest()
        execution = await box.exec(*sh(f"read x; seq 1 {LAST}"), stdin=True, stdout=first)
        again = await box.attach(execution.id, stdout=second)
        unlucky = await (await far.get(box.id)).attach(execution.id, stdout=third)
        with in_time(60):
            await execution.stdin.write(b"\n")
            await second.called.wait()
            assert first.size < MIB and third.size < MIB  # nothing is overwritten that the second has not taken
            second.open()
            for size in (2 * MIB, 4 * MIB):
                await until(lambda size=size: third.size > size)  # type: ignore[misc]
                proxy.cut_all()
            results = [await one.wait() for one in (execution, again, unlucky)]
    assert first.is_of(whole)
    assert bytes(second.data) == whole
    assert [result.dropped for result in results[:2]] == [0, 0]
    assert third.size + results[2].dropped == len(whole)
