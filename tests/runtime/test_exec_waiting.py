"""The execution contract, section 1: waiting."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import time
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest

import hutch
from hutch.errors import (
    DeadlineError,
    InvalidArgumentError,
    InvalidStateError,
    RuntimeClosedError,
    StoppedError,
)
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import PATIENCE, BlockingSink, Sink, in_time, processes, sh, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.execution import LocalExecution
    from hutch.runtime.runtime import LocalRuntime
    from hutch.types import Result

pytestmark = [pytest.mark.root, pytest.mark.anyio]

MIB = 1 << 20


async def test_1_1_wait_returns_with_everything_that_was_written(box: LocalBox) -> None:
    with in_time(30):
        for number in range(100):
            result = await box.run(*sh(f"echo out{number}; echo err{number} >&2"))
            assert (result.exit_code, result.stdout, result.stderr) == (0, b"out%d\n" % number, b"err%d\n" % number)


async def test_1_1_parallel_commands_get_their_own_output_whole(box: LocalBox) -> None:
    async def one(number: int) -> None:
        result = await box.run(*sh(f"seq {number * 1000} {number * 1000 + 5000}; exit {number % 100}"))
        assert result.exit_code == number % 100
        assert result.stdout == b"".join(b"%d\n" % n for n in range(number * 1000, number * 1000 + 5001))

    with in_time(40):
        for _ in range(5):
            async with anyio.create_task_group() as tasks:
                for number in range(16):
                    tasks.start_soon(one, number)


async def test_1_1_command_run_is_start_and_wait(box: LocalBox) -> None:
    sink = io.BytesIO()
    command = hutch.Command(box, "cat", stdin=b"x" * MIB, stdout=sink)
    with pytest.raises(InvalidStateError):
        await command.wait()
    with in_time():
        result = await command.run()
    assert result.exit_code == 0
    assert sink.getvalue() == b"x" * MIB
    assert await command.wait() == result
    with pytest.raises(InvalidStateError):
        await command.start()


async def test_1_2_chunks_then_exit_callback_then_wait(box: LocalBox) -> None:
    order: list[str] = []

    async def slow(data: bytes) -> None:
        await anyio.sleep(0.05)
        order.append("chunk")

    def on_exit(result: Result) -> None:
        assert result.exit_code == 4
        order.append("exit")

    script = "for i in 1 2 3 4 5; do echo $i; echo $i >&2; done; exit 4"
    execution = await box.exec(*sh(script), stdout=slow, stderr=slow, on_exit=on_exit)
    with in_time():
        await execution.wait()
    order.append("wait")
    await anyio.sleep(0.1)  # nothing may come after the end
    assert order[-2:] == ["exit", "wait"]
    assert order.count("exit") == 1
    assert "chunk" in order


async def test_1_2_iterating_ends_before_wait_returns(box: LocalBox) -> None:
    execution = await box.exec(*sh("seq 1 50000; exit 3"))
    finished = False

    async def wait() -> None:
        nonlocal finished
        await execution.wait()
        finished = True

    got = bytearray()
    with in_time():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            async for chunk in execution.stdout:
                assert not finished, "the terminal event came before the last chunk"
                got += chunk
                await anyio.lowlevel.checkpoint()
    assert got == b"".join(b"%d\n" % n for n in range(1, 50001))
    assert execution.exit_code == 3


async def test_1_2_exit_callback_runs_once_also_when_a_sink_failed(box: LocalBox) -> None:
    seen: list[int] = []

    def broken(data: bytes) -> None:
        raise ValueError("no")

    execution = await box.exec(*sh("echo x; exit 5"), stdout=broken, on_exit=lambda r: seen.append(r.exit_code))
    with in_time(), pytest.raises(ValueError, match="no"):
        await execution.wait()
    assert seen == [5]


@pytest.mark.parametrize("kind", ["callable", "async", "blocking"])
async def test_1_3_sink_error_is_kept_and_rest_drained(box: LocalBox, kind: str) -> None:
    calls = 0

    def fail(data: bytes) -> None:
        nonlocal calls
        calls += 1
        raise OSError(f"disk full, call {calls}")

    async def fail_later(data: bytes) -> None:
        fail(data)

    class Writer:
        write = staticmethod(fail)

    sink = {"callable": fail, "async": fail_later, "blocking": Writer()}[kind]
    # Far more than any window holds: a dead sink must not block the process.
    execution = await box.exec(*sh("dd if=/dev/zero bs=64k count=64 2>/dev/null; echo done >&2; exit 42"), stdout=sink)
    with in_time(), pytest.raises(OSError, match="disk full, call 1") as caught:
        await execution.wait()
    assert caught.value.exit_code == 42  # type: ignore[attr-defined]  # set by the contract
    with pytest.raises(OSError, match="disk full, call 1"):
        await execution.wait()
    assert calls == 1
    assert execution.exit_code == 42


async def test_1_3_sink_that_is_cancelled_counts_as_failed(box: LocalBox) -> None:
    async def cancelled(data: bytes) -> None:
        raise asyncio.CancelledError

    execution = await box.exec(*sh("echo x; exit 6"), stdout=cancelled)
    with in_time(), pytest.raises(BaseException) as caught:
        await execution.wait()
    assert not isinstance(caught.value, (TimeoutError, DeadlineError))
    assert execution.exit_code == 6


async def test_1_4_cancelled_wait_leaves_the_command_running(box: LocalBox) -> None:
    execution = await box.exec(*sh("echo before; read line; echo after; exit 7"), stdin=True)
    with anyio.move_on_after(0.1) as scope:
        await execution.wait()
    assert scope.cancelled_caught
    with pytest.raises(DeadlineError):
        await execution.wait(timeout=0.05)
    task = asyncio.ensure_future(execution.wait())
    await anyio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await execution.stdin.write(b"go\n")
    with in_time():
        result = await execution.wait()
    assert (result.exit_code, result.stdout) == (7, b"before\nafter\n")


async def test_1_4_deadline_after_the_reap_does_not_cut_the_drain(box: LocalBox) -> None:
    sink = Sink(shut=True)
    execution = await box.exec(*sh("echo all of it; exit 8"), stdout=sink)
    with in_time():
        await sink.called.wait()
        await until(lambda: _exited(box, execution.id))

    async def open_later() -> None:
        await anyio.sleep(0.3)
        sink.open()

    with in_time():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(open_later)
            result = await execution.wait(timeout=0.05)
    assert result.exit_code == 8
    assert sink.data == b"all of it\n"


async def test_1_4_cancelling_during_the_drain_loses_nothing(box: LocalBox) -> None:
    sink = Sink(shut=True)
    execution = await box.exec(*sh("seq 1 20000; exit 9"), stdout=sink)
    with in_time():
        await sink.called.wait()
        await until(lambda: _exited(box, execution.id))
    with anyio.move_on_after(0.05) as scope:
        await execution.wait()
    assert scope.cancelled_caught
    assert execution.exit_code is None, "the end was reported before the drain"
    sink.open()
    with in_time():
        result = await execution.wait()
    assert result.exit_code == 9
    assert sink.data == b"".join(b"%d\n" % n for n in range(1, 20001))


@pytest.mark.parametrize("timeout", [-1.0, float("nan")])
async def test_1_4_impossible_deadline_is_refused(box: LocalBox, timeout: float) -> None:
    execution = await box.exec("true")
    with pytest.raises(InvalidArgumentError):
        await execution.wait(timeout=timeout)
    with in_time():
        assert (await execution.wait()).exit_code == 0


async def test_1_5_close_ends_the_wait_for_a_running_command(home: Path) -> None:
    errors: list[RuntimeClosedError] = []

    async def wait(execution: LocalExecution) -> None:
        with pytest.raises(RuntimeClosedError) as caught:
            await execution.wait()
        errors.append(caught.value)

    async with anyio.create_task_group() as tasks:
        async with hutch.Runtime.local(home) as runtime:
            box = await runtime.create(IMAGE, auto_remove=True)
            execution = await box.exec(*sh("echo partial; echo other >&2; sleep 60"))
            tasks.start_soon(wait, execution)
            with in_time():
                await until(lambda: bool(execution._collected(1) and execution._collected(2)))
            with in_time(5):
                await runtime.close()
                await runtime.close()
        with in_time(5):
            await until(lambda: bool(errors))
    assert errors[0].exit_code is None
    assert (errors[0].stdout, errors[0].stderr) == (b"partial\n", b"other\n")
    with pytest.raises(RuntimeClosedError):
        await execution.wait()


async def test_1_5_close_breaks_a_drain_and_tells_the_exit_code(home: Path) -> None:
    sink = BlockingSink()
    try:
        async with hutch.Runtime.local(home) as runtime:
            box = await runtime.create(IMAGE, auto_remove=True)
            execution = await box.exec(*sh("echo stuck; echo collected >&2; exit 11"), stdout=sink)
            outcome: list[BaseException] = []

            async def wait() -> None:
                try:
                    await execution.wait()
                except RuntimeClosedError as error:
                    outcome.append(error)

            with in_time():
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(wait)
                    await until(lambda: execution._machine.exit is not None and bool(execution._collected(2)))
                    with in_time(5):
                        await runtime.close()
            assert isinstance(outcome[0], RuntimeClosedError)
            assert outcome[0].exit_code == 11
            assert outcome[0].stderr == b"collected\n"
    finally:
        sink.open.set()


async def test_1_5_nothing_parked_on_a_closed_runtime_hangs(home: Path) -> None:
    """Detached boxes go on, so nothing but the close can end these waits."""
    ended: dict[str, str] = {}
    box_id = ""

    async with hutch.Runtime.local(home) as runtime:
        box = await runtime.create(IMAGE, detach=True, command=["sh", "-c", "echo main; exec sleep 60"])
        box_id = box.id
        await box.start()
        quiet = await box.exec("sleep", "60")
        reader = await box.exec("sleep", "60")
        writer = await box.exec("sleep", "60", stdin=True)

        async def read() -> None:
            async for _ in reader.stdout:
                pass

        async def follow() -> None:
            async for _ in box.logs(follow=True):
                pass

        waits: dict[str, Callable[[], Awaitable[object]]] = {
            "wait": quiet.wait,
            "iterate": read,
            "write": lambda: writer.stdin.write(bytes(4 * MIB)),
            "run": lambda: box.run("sleep", "60"),
            "box": box.wait,
            "logs": follow,
        }

        async def park(name: str) -> None:
            try:
                await waits[name]()
                ended[name] = "returned"
            except hutch.HutchError as error:
                ended[name] = type(error).__name__

        with anyio.move_on_after(PATIENCE) as scope:
            async with anyio.create_task_group() as tasks:
                for name in waits:
                    tasks.start_soon(park, name)
                await anyio.sleep(0.5)
                assert ended == {}
                with in_time(5):
                    await runtime.close()
                with contextlib.suppress(TimeoutError):
                    await until(lambda: len(ended) == len(waits), 5)
                tasks.cancel_scope.cancel()
        assert not scope.cancelled_caught
    async with hutch.Runtime.local(home) as runtime:
        await runtime.remove(box_id, force=True)
    assert sorted(ended) == sorted(waits), f"still parked: {sorted(set(waits) - set(ended))}"
    assert ended["wait"] == ended["run"] == ended["write"] == "RuntimeClosedError"


async def test_1_5_an_earlier_error_wins_over_the_close(home: Path) -> None:
    async with hutch.Runtime.local(home) as runtime:
        box = await runtime.create(IMAGE, auto_remove=True)
        execution = await box.exec("sleep", "60")
        execution._fail(StoppedError("the reap failed"))
        await runtime.close()
        with in_time(), pytest.raises(StoppedError, match="the reap failed"):
            await execution.wait()


async def test_1_5_a_finished_result_survives_the_close(home: Path) -> None:
    async with hutch.Runtime.local(home) as runtime:
        box = await runtime.create(IMAGE, auto_remove=True)
        execution = await box.exec("echo", "kept")
        with in_time():
            result = await execution.wait()
    assert await execution.wait() == result
    with pytest.raises(RuntimeClosedError):
        await runtime.list()


async def test_1_6_many_waiters_before_and_after_the_end_get_the_same(box: LocalBox) -> None:
    execution = await box.exec(*sh("read x; echo $x; exit 12"), stdin=True)
    results: list[Result] = []

    async def wait() -> None:
        results.append(await execution.wait())

    with in_time():
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(wait)
            await anyio.sleep(0.05)
            await execution.stdin.write(b"same\n")
        results += [await execution.wait() for _ in range(3)]
    assert len(results) == 23
    assert set(results) == {results[0]}
    assert (results[0].exit_code, results[0].stdout) == (12, b"same\n")


async def test_1_6_one_waiter_that_leaves_takes_nothing_from_the_others(box: LocalBox) -> None:
    execution = await box.exec(*sh("read x; echo $x"), stdin=True)
    results: list[Result] = []

    async def wait() -> None:
        results.append(await execution.wait())

    with in_time():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            with anyio.move_on_after(0.05):
                await execution.wait()
            await execution.stdin.write(b"x\n")
    assert results[0].stdout == b"x\n"


async def test_1_7_a_background_child_does_not_hold_up_the_result(box: LocalBox) -> None:
    began = anyio.current_time()
    with in_time():
        result = await box.run(*sh("(sleep 30; echo late) & echo out; exit 5"))
    assert anyio.current_time() - began < 3
    assert (result.exit_code, result.stdout) == (5, b"out\n")
    assert result.lingering
    assert not result.truncated


async def test_1_7_output_after_the_exit_is_awaited_while_it_keeps_coming(box: LocalBox) -> None:
    script = "(for i in 1 2 3 4 5 6; do sleep 0.15; echo $i; done; sleep 30; echo late) & echo 0"
    with in_time():
        result = await box.run(*sh(script))
    assert result.stdout == b"0\n1\n2\n3\n4\n5\n6\n"
    assert result.lingering


async def test_1_7_linger_none_waits_for_end_of_file(box: LocalBox) -> None:
    with in_time():
        result = await box.run(*sh("(sleep 1; echo late) & echo out"), linger=None)
    assert result.stdout == b"out\nlate\n"
    assert not result.lingering


async def test_1_7_linger_zero_still_delivers_what_was_written_before_the_exit(box: LocalBox) -> None:
    with in_time():
        for _ in range(20):
            result = await box.run(*sh("sleep 20 & seq 1 10000"), linger=0.0)
            assert result.stdout == b"".join(b"%d\n" % n for n in range(1, 10001))


async def test_1_7_a_trickle_slower_than_linger_before_the_exit_is_not_cut(box: LocalBox) -> None:
    with in_time():
        result = await box.run(*sh("for i in 1 2 3; do sleep 0.4; echo $i; done"), linger=0.1)
    assert (result.stdout, result.lingering) == (b"1\n2\n3\n", False)


async def test_1_7_a_full_pipe_at_the_exit_is_delivered_to_a_slow_sink(box: LocalBox) -> None:
    """More than the window is owed at the exit, and the quiet clock stands still while the window is full."""
    sink = Sink(shut=True)
    script = "(dd if=/dev/zero bs=64k count=40 2>/dev/null; sleep 60) & sleep 0.3; exit 3"
    execution = await box.exec(*sh(script), stdout=sink)
    with in_time():
        await until(lambda: _exited(box, execution.id))
        await anyio.sleep(0.8)
        sink.open()
        result = await execution.wait()
    assert len(sink.data) == 40 * 65536
    assert (result.exit_code, result.lingering) == (3, True)


async def test_1_8_close_is_idempotent_and_releases_everybody(box: LocalBox) -> None:
    execution = await box.exec("sleep", "61.5", stdin=True, tty=True)
    outcomes: list[str] = []

    async def attempt(name: str, action: Callable[[], Awaitable[object]]) -> None:
        with contextlib.suppress(InvalidStateError):
            await action()
        outcomes.append(name)

    with in_time():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(attempt, "wait", execution.wait)
            tasks.start_soon(attempt, "wait", execution.wait)
            tasks.start_soon(attempt, "write", lambda: execution.stdin.write(bytes(MIB)))
            await anyio.sleep(0.05)
            tasks.start_soon(attempt, "resize", lambda: execution.resize(30, 90))
            tasks.start_soon(attempt, "signal", lambda: execution.signal(28))
            for _ in range(3):
                tasks.start_soon(attempt, "close", execution.close)
    assert sorted(outcomes) == ["close", "close", "close", "resize", "signal", "wait", "wait", "write"]
    for operation in (
        lambda: execution.wait(),
        lambda: execution.signal(15),
        lambda: execution.kill(),
        lambda: execution.resize(1, 1),
        lambda: execution.stdin.write(b"x"),
        lambda: execution.stdout.read(),
    ):
        with pytest.raises(InvalidStateError):
            await operation()
    await execution.close()
    assert await processes(box, "sleep 61.5"), "closing the handle must not end the command"


async def test_1_8_close_races_kill(box: LocalBox) -> None:
    async def quiet(action: Callable[[], Awaitable[object]]) -> None:
        with contextlib.suppress(InvalidStateError):
            await action()

    with in_time(30):
        for _ in range(20):
            execution = await box.exec("sleep", "62")
            async with anyio.create_task_group() as tasks:
                for action in (execution.wait, execution.kill, execution.close, execution.kill, execution.close):
                    tasks.start_soon(quiet, action)
        assert box._executions == set()
        assert (await box.run("echo", "well")).stdout == b"well\n"


async def test_1_8_close_of_a_finished_execution_keeps_its_result(box: LocalBox) -> None:
    execution = await box.exec("echo", "x")
    with in_time():
        result = await execution.wait()
    await execution.close()
    await execution.close()
    assert execution.exit_code == result.exit_code == 0


async def test_1_8_an_abandoned_create_leaves_no_box(runtime: LocalRuntime) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await runtime.create(IMAGE, pull="always")
    assert await runtime.list() == []
    assert list(runtime.home.boxes.iterdir()) == []


async def test_1_8_an_abandoned_start_leaves_nothing_running_and_can_be_repeated(runtime: LocalRuntime) -> None:
    for delay in (0.0, 0.001, 0.003, 0.006, 0.01):
        box = await runtime.create(IMAGE)
        with anyio.move_on_after(delay) as scope:
            await box.start()
        info = await box.info()
        if scope.cancelled_caught:
            assert info.pid is None
            assert info.state == "configured", "nobody stopped this box"
        with in_time():
            assert (await box.run("echo", "ok")).stdout == b"ok\n"
        await box.remove(force=True)


async def test_1_8_an_abandoned_exec_leaves_no_command_behind(box: LocalBox) -> None:
    await box.run("true")
    for turns in range(12):
        task = asyncio.ensure_future(box.exec("sleep", f"63.{turns}"))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            execution = await task
        except asyncio.CancelledError:
            continue
        await execution.kill()
        await execution.close()
    with in_time():
        await until(lambda: _none_left(box, "sleep 63."))
    assert box._executions == set()


async def test_1_8_a_cancelled_run_kills_its_command(box: LocalBox) -> None:
    for delay in (0.0, 0.001, 0.01, 0.1):
        with anyio.move_on_after(delay):
            await box.run("sleep", "64.5")
    with in_time():
        await until(lambda: _none_left(box, "sleep 64.5"))
    assert box._executions == set()


async def test_1_8_box_handles_close_twice_and_while_in_use(runtime: LocalRuntime) -> None:
    async with await runtime.create(IMAGE, auto_remove=True) as box:
        execution = await box.exec("sleep", "60")
        with in_time():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(execution.wait)
                tasks.start_soon(box.stop)
                tasks.start_soon(box.stop)
    assert await runtime.list() == []


async def test_1_8_descriptors_are_not_leaked(box: LocalBox) -> None:
    await box.run("true")
    before = len(os.listdir("/proc/self/fd"))
    with in_time(30):
        for _ in range(20):
            await box.run("seq", "1", "1000")
            execution = await box.exec(*sh("dd if=/dev/zero bs=64k count=40 2>/dev/null"), stdout=lambda data: None)
            await execution.wait()
            await box.files.write("/tmp/x", b"x")
            await box.files.read("/tmp/x")
    assert len(os.listdir("/proc/self/fd")) <= before + 2


async def _exited(box: LocalBox, exec_id: str) -> bool:
    return any(e.id == exec_id and e.exit_code is not None for e in await box.executions())


async def _none_left(box: LocalBox, marker: str) -> bool:
    return not await processes(box, marker)


async def test_1_2_the_exit_callback_comes_without_anyone_waiting(box: LocalBox) -> None:
    called = anyio.Event()
    results: list[Result] = []

    def on_exit(result: Result) -> None:
        results.append(result)
        called.set()

    await box.exec(*sh("echo out; echo err >&2; exit 9"), on_exit=on_exit)
    with anyio.fail_after(10):
        await called.wait()
    assert (results[0].exit_code, results[0].stdout, results[0].stderr) == (9, b"out\n", b"err\n")


async def test_1_2_one_sink_for_both_streams_is_called_one_chunk_at_a_time(box: LocalBox) -> None:
    class Sink:
        def __init__(self) -> None:
            self.inside = 0
            self.most = 0
            self.size = 0

        def write(self, data: bytes) -> None:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.size += len(data)
            time.sleep(0.002)  # long enough for the other stream's thread to come in
            self.inside -= 1

    sink = Sink()
    script = "for i in 1 2 3 4 5 6 7 8; do head -c 100000 /dev/zero; head -c 100000 /dev/zero >&2; done"
    execution = await box.exec(*sh(script), stdout=sink, stderr=sink)
    assert (await execution.wait()).exit_code == 0
    assert (sink.size, sink.most) == (1_600_000, 1)
