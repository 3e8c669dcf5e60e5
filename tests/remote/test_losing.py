"""The execution contract, section 3, where it takes a connection that breaks at the right moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import UpstreamUnavailableError
from hutch.runtime.home import new_id
from hutch.sdk.remote import RemoteRuntime
from hutch.sdk.remote_channel import RemoteChannel
from hutch.sdk.remote_doors import exec_body
from hutch.sdk.remote_wire import NextBody
from tests.remote.conftest import TOKEN
from tests.remote.faultproxy import Fault, FaultProxy
from tests.remote.test_faults import numbers
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import Sink, in_time, sh, until

if TYPE_CHECKING:
    from hutch.sdk.remote_box import RemoteBox
    from tests.remote.processes import Process

pytestmark = [pytest.mark.root, pytest.mark.anyio]


class Breaker:
    """Breaks connections before the words of the server pass, so many times."""

    def __init__(self) -> None:
        self.words = b""
        self.left = 0

    def __call__(self, data: bytes) -> None:
        if self.left and self.words in data:
            self.left -= 1
            raise ConnectionResetError


async def test_3_1_the_same_watcher_again_ends_its_earlier_connection(runtime: RemoteRuntime, box: RemoteBox) -> None:
    execution = await box.exec("sleep", "60")
    watcher = new_id()
    first = await RemoteChannel.open(runtime.http, box.id, execution.id, watcher)
    other = await RemoteChannel.open(runtime.http, box.id, execution.id, new_id())
    second = await RemoteChannel.open(runtime.http, box.id, execution.id, watcher)
    await until(lambda: first.closed, 5)
    assert not other.closed and not second.closed
    for channel in (other, second):
        channel.close()


async def test_3_1_the_same_watcher_again_ends_its_line(runtime: RemoteRuntime, box: RemoteBox) -> None:
    """Also when its command is a further one on its connection."""
    done, watcher, further = await box.exec("true"), new_id(), new_id()
    line = await RemoteChannel.open(runtime.http, box.id, done.id, new_id())
    await line.launch(NextBody(watcher=watcher, exec=exec_body(further, ("sleep", "60"))))
    again = await RemoteChannel.open(runtime.http, box.id, further, watcher)
    await until(lambda: line.closed, 5)
    assert not again.closed
    again.close()


async def test_3_1_much_that_was_on_its_way_comes_again(server: Process, box: RemoteBox) -> None:
    """On a slow connection more can be on its way than the box keeps; what it lets go must have arrived."""
    slow = [Fault(), Fault(kind="reset", after=2_000_000, latency=0.01)]
    async with (
        FaultProxy(server.port, lambda: slow.pop(0) if armed and slow else Fault()) as proxy,
        RemoteRuntime(proxy.url, TOKEN) as far,
    ):
        armed = False
        far_box = await far.get(box.id)
        armed = True
        proxy.cut_all()
        with in_time(30):
            result = await far_box.run(*sh("seq 1 1000000; exit 7"))
        assert proxy.faults == 1
        assert (result.stdout, result.exit_code, result.truncated) == (numbers(1_000_000), 7, False)


@pytest.mark.parametrize("words", [b"the-last-words", b"\n9999\n"])
async def test_3_2_a_cut_after_the_end_of_the_command_loses_nothing(
    server: Process, box: RemoteBox, words: bytes
) -> None:
    """The command has ended before the connection breaks: whoever asks is told so, but the output is still there."""
    breaker = Breaker()
    async with FaultProxy(server.port, watch=breaker) as proxy, RemoteRuntime(proxy.url, TOKEN) as far:
        far_box = await far.get(box.id)
        breaker.words, breaker.left = words, 1
        with in_time(20):
            sink = Sink()
            execution = await far_box.exec(*sh("seq 1 20000; echo the-last-words; exit 9"), stdout=sink)
            result = await execution.wait()
        assert breaker.left == 0
        assert bytes(sink.data) == numbers(20_000) + b"the-last-words\n"
        assert (result.exit_code, result.truncated) == (9, False)


@pytest.mark.parametrize("way", ["request", "line"])
async def test_3_4_a_start_whose_answer_is_lost_is_carried_out_once(server: Process, box: RemoteBox, way: str) -> None:
    breaker = Breaker()
    async with FaultProxy(server.port, watch=breaker) as proxy, RemoteRuntime(proxy.url, TOKEN) as far:
        far_box = await far.get(box.id)
        if way == "line":
            await far_box.run("true")
        breaker.words, breaker.left = b'{"pid":', 1
        with in_time(20):
            result = await far_box.run(*sh("echo run >> /runs; cat; exit 8"), input=b"text")
        assert breaker.left == 0
        assert (result.exit_code, result.stdout) == (8, b"text")
        assert await box.files.read("/runs") == b"run\n"


async def test_a_creation_whose_answer_is_lost_makes_one_box(server: Process, runtime: RemoteRuntime) -> None:
    breaker = Breaker()
    async with FaultProxy(server.port, watch=breaker) as proxy, RemoteRuntime(proxy.url, TOKEN) as far:
        breaker.words, breaker.left = b'"configured"', 2
        box = await far.create(IMAGE, detach=True)
        assert breaker.left == 0
        assert [info.id for info in await runtime.list()] == [box.id]


async def test_a_creation_without_an_answer_leaves_no_box(server: Process, runtime: RemoteRuntime) -> None:
    breaker = Breaker()
    async with FaultProxy(server.port, watch=breaker) as proxy, RemoteRuntime(proxy.url, TOKEN, patience=0.2) as far:
        breaker.words, breaker.left = b'"configured"', 1000
        with pytest.raises(UpstreamUnavailableError):
            await far.create(IMAGE)
        assert breaker.left < 1000
        breaker.left = 0
        with in_time():
            while await runtime.list():
                await anyio.sleep(0.05)


async def test_commands_follow_each_other_on_one_connection(server: Process, box: RemoteBox) -> None:
    connections = 0

    def count(data: bytes) -> None:
        nonlocal connections
        connections += b"101 Switching" in data

    async with FaultProxy(server.port, watch=count) as proxy, RemoteRuntime(proxy.url, TOKEN) as far:
        far_box = await far.get(box.id)
        for number in range(20):
            result = await far_box.run(*sh(f"cat; echo {number}; exit {number}"), input=b"x")
            assert (result.stdout, result.exit_code) == (b"x%d\n" % number, number)
        assert connections == 1
        with in_time():
            assert (await far_box.run("sleep", "60", timeout=0.2)).timed_out
            execution = await far_box.exec("cat", stdin=True)
            await execution.close()
            assert (await far_box.run("echo", "after")).stdout == b"after\n"
