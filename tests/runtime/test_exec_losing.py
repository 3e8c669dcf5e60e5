"""The execution contract, section 3: losing the connection. Here: the agent's connection, and the host process."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from hutch.core import agentproto as proto
from hutch.errors import ExecError, InvalidArgumentError, NotFoundError, SessionReapedError
from hutch.types import Result
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import Sink, in_time, sh, until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from hutch.runtime.box import LocalBox
    from hutch.runtime.execution import LocalExecution
    from hutch.runtime.runtime import LocalRuntime

pytestmark = [pytest.mark.root, pytest.mark.anyio]

MIB = 1 << 20
LAST = 700_000
"""Numbers that the streaming commands write: about 4.7 MB, many windows."""


def numbers(last: int = LAST) -> bytes:
    """What ``seq 1 last`` writes."""
    return b"".join(b"%d\n" % n for n in range(1, last + 1))


def cut(box: LocalBox) -> None:
    """Break the connection to the box's agent as a crash would: without a word."""
    channel = box._channels.find(box.id)
    assert channel is not None
    channel.close()


async def cut_in_its_start(runtime: LocalRuntime, box: LocalBox, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run what starts a command, and break the connection between the request and its answer."""
    await box.start()
    await box.run("true")
    directory = runtime.home.box(box.id)
    with in_time(30):
        async with anyio.create_task_group() as tasks:
            await runtime.engines.container.freeze(directory)
            try:
                tasks.start_soon(run)
                await until(lambda: bool((channel := box._channels.find(box.id)) and channel._requests))
                cut(box)
            finally:
                await runtime.engines.container.thaw(directory)


async def test_3_1_a_cut_connection_is_invisible_in_the_result(box: LocalBox) -> None:
    expected = numbers()
    for size in (0, 1, 100_000, 600_000, 1_500_000, 3_000_000):
        sink = Sink()
        execution = await box.exec(*sh(f"seq 1 {LAST}; echo err >&2; exit 31"), stdout=sink)
        with in_time():
            while len(sink.data) < size:
                await anyio.lowlevel.checkpoint()
            cut(box)
            result = await execution.wait()
        assert bytes(sink.data) == expected, f"cut after {size} bytes"
        assert (result.exit_code, result.stderr, result.truncated, result.dropped) == (31, b"err\n", False, 0)


async def test_3_1_input_survives_cuts(box: LocalBox) -> None:
    data = numbers()
    execution = await box.exec("cat", stdin=True)
    received = bytearray()

    async def feed() -> None:
        for start in range(0, len(data), 50_000):
            await execution.stdin.write(data[start : start + 50_000])
        await execution.stdin.close()

    async def read() -> None:
        async for chunk in execution.stdout:
            received.extend(chunk)

    with in_time(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(feed)
            tasks.start_soon(read)
            mark = 0
            while len(received) < len(data):
                await anyio.lowlevel.checkpoint()
                channel = box._channels.find(box.id)
                if len(received) - mark > 150_000 and channel is not None and channel._watchers:
                    mark = len(received)
                    channel.close()
        result = await execution.wait()
    assert bytes(received) == data
    assert result.exit_code == 0


async def test_3_1_many_cuts_and_several_executions(box: LocalBox) -> None:
    results: list[Result] = []

    async def one(number: int) -> None:
        results.append(await box.run(*sh(f"seq 1 {LAST}; echo {number} >&2; exit {number}")))

    with in_time(30):
        async with anyio.create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(one, number)
            while len(results) < 4:
                await anyio.sleep(0.03)
                if (channel := box._channels.find(box.id)) is not None and channel._watchers:
                    channel.close()
    expected = numbers()
    assert sorted(r.exit_code for r in results) == [0, 1, 2, 3]
    for result in results:
        assert result.stdout == expected
        assert result.stderr == b"%d\n" % result.exit_code


async def test_3_1_a_cut_while_a_command_is_being_started(runtime: LocalRuntime, box: LocalBox) -> None:
    """It is started once and watched from its first byte, though the answer to the first request is lost."""
    results: list[Result] = []

    async def run() -> None:
        results.append(await box.run(*sh(f"echo run >> /runs; cat; seq 1 {LAST}; exit 33"), input=b"in\n"))

    await cut_in_its_start(runtime, box, run)
    assert results[0].stdout == b"in\n" + numbers()
    assert (results[0].exit_code, results[0].truncated) == (33, False)
    assert await box.files.read("/runs") == b"run\n"


@pytest.mark.parametrize("found", [True, False], ids=["starts", "fails to start"])
async def test_3_1_a_cut_while_a_command_is_slow_to_start(runtime: LocalRuntime, box: LocalBox, found: bool) -> None:
    """Asked for again while its first start is still under way, it has the outcome of that start."""
    path = "/n:" * 40_000 + ("/bin" if found else "/n")  # a search that takes long
    results: list[Result | ExecError] = []

    async def run() -> None:
        try:
            results.append(await box.run(*sh("echo run >> /runs; cat; exit 34"), input=b"in\n", env={"PATH": path}))
        except ExecError as error:
            results.append(error)

    await cut_in_its_start(runtime, box, run)
    (result,) = results
    if found:
        assert isinstance(result, Result)
        assert (result.stdout, result.exit_code) == (b"in\n", 34)
        assert await box.files.read("/runs") == b"run\n"
    else:
        assert isinstance(result, ExecError)
        assert result.cause == "command_not_found"


async def test_3_1_a_cut_while_a_sink_is_slow_duplicates_nothing(box: LocalBox) -> None:
    sink = Sink(shut=True)
    execution = await box.exec(*sh(f"seq 1 {LAST}; exit 32"), stdout=sink)
    with in_time():
        await sink.called.wait()
        for _ in range(3):
            await anyio.sleep(0.05)
            if box._channels.find(box.id):
                cut(box)
            await box.run("true")
        sink.open()
        result = await execution.wait()
    assert bytes(sink.data) == numbers()
    assert result.exit_code == 32


async def test_3_1_a_cut_while_a_sink_reads_the_shared_window_overwrites_nothing(box: LocalBox) -> None:
    class Slow(io.RawIOBase):
        """Looks at its bytes late, and twice."""

        def __init__(self) -> None:
            self.data = bytearray()
            self.torn = 0

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            first = bytes(data)
            time.sleep(0.02)
            self.torn += bytes(data) != first
            self.data += data
            return len(data)

    sink = Slow()
    execution = await box.exec(*sh(f"seq 1 {2 * LAST}; exit 38"), stdout=sink)
    with in_time(30):
        task = asyncio.ensure_future(execution.wait())
        while not task.done():
            await anyio.sleep(0.35)
            if len(sink.data) > 2 * MIB and box._channels.find(box.id):
                cut(box)
        result = await task
    assert sink.torn == 0, "the window was overwritten while a sink read it"
    assert bytes(sink.data) == numbers(2 * LAST)
    assert (result.exit_code, result.truncated) == (38, False)


async def test_3_2_ended_while_cut_the_backlog_is_still_fetched(box: LocalBox, runtime: LocalRuntime) -> None:
    sink = Sink()
    execution = await box.exec(*sh("echo first; read x; echo last; exit 33"), stdin=True, stdout=sink)
    with in_time():
        await until(lambda: bytes(sink.data) == b"first\n")
        await execution.stdin.write(b"\n")
        cut(box)
        result = await execution.wait()
    assert (bytes(sink.data), result.exit_code, result.truncated) == (b"first\nlast\n", 33, False)


async def test_3_2_without_a_terminal_event_the_result_says_that_it_may_be_incomplete(box: LocalBox) -> None:
    sink = Sink()
    execution = await box.exec(*sh("echo before; sleep 60"), stdout=sink)
    unwatched = await box.exec("sleep", "60")
    with in_time():
        await until(lambda: bytes(sink.data) == b"before\n")
        pid = (await box.info()).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        result = await execution.wait()
        assert (await unwatched.wait()).exit_code == -9
    assert (result.exit_code, result.truncated) == (-9, True)
    assert bytes(sink.data) == b"before\n"
    await until(lambda: _is(box, "failed"))  # its last process is on its way out for a moment
    info = await box.info()
    assert info.exit_code is None
    assert info.reason


async def test_3_3_a_late_watcher_sees_the_backlog_and_the_exit(box: LocalBox) -> None:
    execution = await box.exec(*sh("seq 1 5000; echo err >&2; exit 34"))
    with in_time():
        await until(lambda: _ended(box, execution.id))
        for _ in range(2):
            late = await box.attach(execution.id)
            result = await late.wait()
            assert (result.exit_code, result.stdout, result.stderr) == (34, numbers(5000), b"err\n")
            await late.close()
        assert (await execution.wait()).stdout == numbers(5000)


async def test_3_3_what_was_released_is_reaped_and_what_never_was_is_not_found(box: LocalBox) -> None:
    execution = await box.exec("true")
    with in_time():
        await execution.wait()
        channel = box._channels.find(box.id)
        assert channel is not None
        await channel.request(lambda req: proto.simple(proto.Request.FORGET, req=req, exec_id=execution.id))
        with pytest.raises(SessionReapedError):
            await box.attach(execution.id)
        for unknown in ("zzzzzzzzzzzz", "main", "not an id", "../../../etc/passwd", "", "x" * 500):
            with pytest.raises(NotFoundError):
                await box.attach(unknown)
        assert (await box.run("echo", "well")).stdout == b"well\n"


async def test_3_1_attach_from_a_position_gets_each_later_byte_once(box: LocalBox) -> None:
    execution = await box.exec(*sh("printf 0123456789; printf abcdef >&2"))
    with in_time():
        await execution.wait()
        for out, err in ((0, 0), (3, 0), (10, 6), (9, 5)):
            result = await (await box.attach(execution.id, after=(out, err))).wait()
            assert (result.stdout, result.stderr) == (b"0123456789"[out:], b"abcdef"[err:])
        with pytest.raises(InvalidArgumentError):
            await (await box.attach(execution.id, after=(11, 0))).wait()
        with pytest.raises(InvalidArgumentError):
            await box.attach(execution.id, after=(-1, 0))


async def test_3_1_several_watchers_in_one_process_each_get_everything(box: LocalBox) -> None:
    execution = await box.exec(*sh(f"read x; seq 1 {LAST}; exit 35"), stdin=True)
    first, second = Sink(), Sink()
    results: list[Result] = []

    async def watch(watcher: LocalExecution) -> None:
        results.append(await watcher.wait())

    with in_time(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch, execution)
            tasks.start_soon(watch, await box.attach(execution.id, stdout=first))
            tasks.start_soon(watch, await box.attach(execution.id, stdout=second))
            await anyio.sleep(0.05)
            await execution.stdin.write(b"\n")
    expected = numbers()
    assert (await execution.wait()).stdout == bytes(first.data) == bytes(second.data) == expected
    assert [r.exit_code for r in results] == [35, 35, 35]


async def test_3_1_a_watcher_that_closes_leaves_the_others_alone(box: LocalBox) -> None:
    execution = await box.exec(*sh(f"read x; seq 1 {LAST}; exit 36"), stdin=True)
    with in_time():
        other = await box.attach(execution.id, stdout=Sink())
        task = asyncio.ensure_future(execution.wait())
        await execution.stdin.write(b"\n")
        await other.close()
        assert (await task).stdout == numbers()


@pytest.mark.parametrize("size", [0, 200_000, 2_500_000])
async def test_3_4_killing_the_host_process_in_mid_stream_loses_nothing(
    home: Path, runtime: LocalRuntime, size: int
) -> None:
    command = sh(f"echo run >> /runs; seq 1 {LAST}; echo err >&2; exit 37")
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("detached_host.py")), str(home), IMAGE, *command],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        with in_time(30):
            first = await anyio.to_thread.run_sync(process.stdout.readline)
            box_id, exec_id = first.decode().split()
            seen = await anyio.to_thread.run_sync(process.stdout.read, size) if size else b""
            process.kill()
            process.wait()
            seen += await anyio.to_thread.run_sync(process.stdout.read)  # what it had handed over when it died
            box = await runtime.get(box_id)
            sink = Sink()
            execution = await box.attach(exec_id, after=(len(seen), 0), stdout=sink)
            result = await execution.wait()
            assert seen + bytes(sink.data) == numbers()
            assert (result.exit_code, result.stderr, result.truncated) == (37, b"err\n", False)
            assert (await box.run("cat", "/runs")).stdout == b"run\n", "the command was run again"
            assert (await box.info()).detach
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


async def test_3_4_a_host_that_dies_before_it_read_anything_loses_nothing(home: Path, runtime: LocalRuntime) -> None:
    """The hold: what nobody has read yet is kept for the next watcher, not dropped."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("detached_host.py")), str(home), IMAGE, *sh("seq 1 300000")],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        with in_time(30):
            box_id, exec_id = (await anyio.to_thread.run_sync(process.stdout.readline)).decode().split()
            process.kill()
            process.wait()
            seen = await anyio.to_thread.run_sync(process.stdout.read)
            await anyio.sleep(0.3)
            box = await runtime.get(box_id)
            result = await (await box.attach(exec_id, after=(len(seen), 0))).wait()
            assert seen + result.stdout == numbers(300000)
    finally:
        process.stdout.close()


async def _ended(box: LocalBox, exec_id: str) -> bool:
    return any(e.id == exec_id and e.exit_code is not None for e in await box.executions())


async def _is(box: LocalBox, state: str) -> bool:
    return (await box.info()).state == state
