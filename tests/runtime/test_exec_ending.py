"""The execution contract, section 4: ending a command, and starting one."""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from hutch.engine.container import ContainerEngine
from hutch.errors import (
    ExecError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    StoppedError,
)
from hutch.runtime.runtime import LocalRuntime
from hutch.types import ExecState
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import in_time, next_line, processes, sh, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from hutch.engine.base import BoxPlan, Started
    from hutch.runtime.box import LocalBox

pytestmark = [pytest.mark.root, pytest.mark.anyio]


@pytest.mark.parametrize("code", [0, 1, 2, 42, 126, 127, 128, 137, 255])
async def test_4_1_exit_codes_round_trip(box: LocalBox, code: int) -> None:
    result = await box.run(*sh(f"exit {code}"))
    assert (result.exit_code, result.signal, result.ok) == (code, None, code == 0)


@pytest.mark.parametrize("number", [1, 2, 3, 6, 9, 10, 11, 15])
async def test_4_1_death_by_signal_is_minus_its_number(box: LocalBox, number: int) -> None:
    execution = await box.exec("sleep", "60")
    await execution.signal(number)
    with in_time():
        result = await execution.wait()
    assert (result.exit_code, result.signal) == (-number, signal.Signals(number))
    assert not result.ok


async def test_4_2_timeout_terminates_the_whole_group_and_delivers_what_was_written(box: LocalBox) -> None:
    began = time.monotonic()
    with in_time():
        result = await box.run(*sh("echo out; echo err >&2; sleep 65.1 & sleep 65.2"), timeout=0.3)
    assert 0.25 < time.monotonic() - began < 2
    assert (result.exit_code, result.timed_out) == (-15, True)
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    with in_time():
        await until(lambda: _none_left(box, "sleep 65."))


async def test_4_2_what_ignores_sigterm_is_killed_after_kill_after(box: LocalBox) -> None:
    began = time.monotonic()
    with in_time():
        result = await box.run(
            *sh("trap '' TERM; echo started; while :; do sleep 0.05; done"), timeout=0.3, kill_after=0.5
        )
    assert 0.75 < time.monotonic() - began < 3
    assert (result.exit_code, result.signal, result.timed_out) == (-9, signal.SIGKILL, True)
    assert result.stdout == b"started\n"


async def test_4_2_a_command_may_end_itself_after_sigterm(box: LocalBox) -> None:
    script = "trap 'echo cleaning; exit 9' TERM; echo started; while :; do sleep 0.05; done"
    with in_time():
        result = await box.run(*sh(script), timeout=0.3)
    assert (result.exit_code, result.timed_out, result.stdout) == (9, True, b"started\ncleaning\n")


async def test_4_2_a_background_child_that_ignores_sigterm_is_killed_too(box: LocalBox) -> None:
    script = "(trap '' TERM; exec sleep 66.6) & sleep 66.7"
    with in_time():
        result = await box.run(*sh(script), timeout=0.2, kill_after=0.3, linger=None)
        assert result.timed_out
        await until(lambda: _none_left(box, "sleep 66."))


async def test_4_2_the_timed_out_status_is_listed(box: LocalBox) -> None:
    execution = await box.exec("sleep", "60", timeout=0.1)
    other = await box.exec("sleep", "60")
    done = await box.exec("true")
    with in_time():
        assert (await execution.wait()).timed_out
        await done.wait()
    states = {e.id: (e.state, e.exit_code) for e in await box.executions()}
    assert states[execution.id] == (ExecState.TIMED_OUT, -15)
    assert states[other.id] == (ExecState.RUNNING, None)
    assert states[done.id] == (ExecState.COMPLETED, 0)
    await other.kill()
    with in_time():
        await other.wait()
    assert {e.id: e.state for e in await box.executions()}[other.id] is ExecState.KILLED


@pytest.mark.parametrize("timeout", [None, 0, 0.0, 60])
async def test_4_2_no_timeout(box: LocalBox, timeout: float | None) -> None:
    result = await box.run(*sh("sleep 0.2; echo x"), timeout=timeout)
    assert (result.exit_code, result.stdout, result.timed_out) == (0, b"x\n", False)


@pytest.mark.parametrize("value", [-1, -0.001, math.nan, math.inf, 1e300])
@pytest.mark.parametrize("option", ["timeout", "kill_after", "linger"])
async def test_4_2_impossible_time_spans_are_refused(box: LocalBox, option: str, value: float) -> None:
    with pytest.raises(InvalidArgumentError, match=option):
        await box.exec("true", **{option: value})  # type: ignore[arg-type]
    assert list(await box.executions()) == []


async def test_4_3_kill_ends_the_whole_group(box: LocalBox) -> None:
    execution = await box.exec(*sh("trap '' TERM HUP INT; sleep 67.1 & sleep 67.2 & echo up; wait"))
    chunks = aiter(execution.stdout)
    with in_time():
        assert await anext(chunks) == b"up\n"
        await execution.kill()
        result = await execution.wait() if [c async for c in chunks] == [] else None
        assert result is not None
        assert (result.exit_code, result.signal) == (-9, signal.SIGKILL)
        await until(lambda: _none_left(box, "sleep 67."))


@pytest.mark.parametrize("number", [1, 2, 10, 12, 15, 28])
async def test_4_3_signal_forwards_exactly_that_one(box: LocalBox, number: int) -> None:
    traps = "; ".join(f"trap 'echo {n}' {n}" for n in (1, 2, 10, 12, 15, 28))
    execution = await box.exec(*sh(f"{traps}; echo up; while :; do sleep 0.02; done"))
    chunks = aiter(execution.stdout)
    with in_time():
        assert await anext(chunks) == b"up\n"
        await execution.signal(number)
        assert await anext(chunks) == b"%d\n" % number
        await execution.kill()


async def test_4_3_signal_on_a_finished_command_is_an_error(box: LocalBox) -> None:
    execution = await box.exec("true")
    with in_time():
        await execution.wait()
    actions: tuple[Callable[[], Awaitable[None]], ...] = (lambda: execution.signal(15), execution.kill)
    for action in actions:
        with pytest.raises(InvalidStateError):
            await action()
    running = await box.exec("sleep", "60")
    for number in (0, -1, 65, 1000):
        with pytest.raises(InvalidArgumentError):
            await running.signal(number)
    late = await box.attach(execution.id)
    with in_time(), pytest.raises(InvalidStateError):
        await late.signal(15)


async def test_4_3_stopping_the_box_ends_every_wait(box: LocalBox) -> None:
    plain = await box.exec(*sh("echo kept; sleep 60"))
    stubborn = await box.exec(*sh("trap '' TERM; echo kept; while :; do sleep 0.05; done"))
    codes: dict[str, int] = {}
    outputs: dict[str, bytes] = {}

    async def wait(name: str, execution: object) -> None:
        result = await execution.wait()  # type: ignore[attr-defined]
        codes[name], outputs[name] = result.exit_code, result.stdout

    with in_time(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, "plain", plain)
            tasks.start_soon(wait, "stubborn", stubborn)
            await until(lambda: bool(plain._collected(1) and stubborn._collected(1)))
            await box.stop(timeout=0.5)
    assert codes == {"plain": -15, "stubborn": -9}
    assert set(outputs.values()) == {b"kept\n"}
    assert (await box.info()).state == "stopped"


@pytest.mark.parametrize(
    ("command", "options", "cause"),
    [
        (("no-such-command",), {}, "command_not_found"),
        (("/no/such/file",), {}, "command_not_found"),
        (("",), {}, "command_not_found"),
        (("/etc/passwd",), {}, "not_executable"),
        (("/etc",), {}, "not_executable"),
        (("true",), {"cwd": "/no/such/dir"}, "bad_cwd"),
        (("true",), {"cwd": "/etc/passwd"}, "bad_cwd"),
        (("true",), {"user": "nobody-here"}, "bad_user"),
        (("true",), {"user": "root:no-such-group"}, "bad_user"),
        (("true",), {"user": "4294967295"}, "bad_user"),
    ],
)
async def test_4_4_start_failures_are_typed_and_leave_no_execution(
    box: LocalBox, command: tuple[str, ...], options: dict[str, str], cause: str
) -> None:
    with in_time(), pytest.raises(ExecError) as caught:
        await box.exec(*command, **options)  # type: ignore[arg-type]
    assert caught.value.cause == cause
    assert caught.value.command == command
    assert (caught.value.code, caught.value.status) == ("execution_failed", 422)
    named = options.get("cwd") or options.get("user", "").split(":")[-1] or command[0] or "command"
    assert named in str(caught.value)
    assert await box.executions() == []
    assert box._executions == set()


async def test_4_4_arguments_that_cannot_be(box: LocalBox) -> None:
    actions: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: box.exec("echo", "a\0b"),
        lambda: box.exec("echo", 1),  # type: ignore[arg-type]
        lambda: box.exec("true", env={"A=B": "x"}),
        lambda: box.exec("true", env={"A": "x\0"}),
        lambda: box.exec("true", env={"": "x"}),
        lambda: box.exec("echo", "x" * (2 << 20)),
    )
    for action in actions:
        with in_time(), pytest.raises(InvalidArgumentError):
            await action()
    with in_time(), pytest.raises((ExecError, InvalidArgumentError)):
        await box.exec("echo", *(["x" * 1000] * 900), env={"A": "x" * 140_000})
    assert (await box.run("echo", "well")).stdout == b"well\n"


@contextlib.contextmanager
def ignoring(*numbers: int) -> Iterator[None]:
    """This process ignores and blocks signals meanwhile."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGCONT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2, signal.SIGCONT])
        for number, handler in before.items():
            signal.signal(number, handler)


async def test_4_4_a_command_starts_with_a_clean_slate(runtime: LocalRuntime) -> None:
    with ignoring(signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE):
        box = await runtime.create(IMAGE)
        await box.start()
    for tty in (False, True):
        execution = await box.exec("cat", "/proc/self/status", "/proc/self/stat", tty=tty)
        with in_time():
            text = (await execution.wait()).stdout.decode()
        status = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        assert [int(status[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt", "SigPnd")] == [0, 0, 0, 0]
        fields = text.splitlines()[-1].rsplit(")", 1)[1].split()
        pid, group, session = int(status["Pid"]), int(fields[2]), int(fields[3])
        assert pid == group == session
        execution = await box.exec("ls", "/proc/self/fd", tty=tty, stdin=True)
        with in_time():
            assert (await execution.wait()).stdout.split() == [b"0", b"1", b"2", b"3"]  # 3 is the directory itself


async def test_4_4_environment_directory_and_user(runtime: LocalRuntime) -> None:
    box = await runtime.create(IMAGE, env={"A": "box", "B": "box"}, workdir="/tmp", user="user")
    with in_time():
        result = await box.run(*sh("echo $A $B $C $HOME; pwd; id -un; id -gn; umask"), env={"B": "exec", "C": "exec"})
        assert result.text.split("\n") == ["box exec exec /home/user", "/tmp", "user", "user", "0022", ""]
        result = await box.run(*sh("pwd; id -u; id -g; echo $HOME"), cwd="/etc", user="0:50")
        assert result.text.split() == ["/etc", "0", "50", "/root"]


class CountingEngine(ContainerEngine):
    """The container engine, counting its starts."""

    def __init__(self) -> None:
        super().__init__()
        self.starts = 0

    async def start(self, plan: BoxPlan) -> Started:
        self.starts += 1
        return await super().start(plan)


async def test_4_5_the_first_exec_starts_the_box_once_however_many_race(home: Path) -> None:
    engine = CountingEngine()
    async with LocalRuntime(home, engine=engine) as runtime:
        box = await runtime.create(IMAGE)
        assert (await box.info()).state == "configured"
        outputs: list[bytes] = []

        async def one(number: int) -> None:
            outputs.append((await box.run("echo", str(number))).stdout)

        with in_time():
            async with anyio.create_task_group() as tasks:
                for number in range(16):
                    tasks.start_soon(one, number)
        assert sorted(outputs) == sorted(b"%d\n" % n for n in range(16))
        assert engine.starts == 1
        await box.remove(force=True)


async def test_4_5_a_racer_that_gives_up_does_not_fail_the_others(runtime: LocalRuntime) -> None:
    for delay in (0.0, 0.002, 0.005):
        box = await runtime.create(IMAGE)
        outputs: list[bytes] = []

        async def one(box: LocalBox, outputs: list[bytes]) -> None:
            outputs.append((await box.run("echo", "x")).stdout)

        with in_time():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_give_up, box, delay)
                await anyio.lowlevel.checkpoint()
                for _ in range(4):
                    tasks.start_soon(one, box, outputs)
        assert outputs == [b"x\n"] * 4
        await box.remove(force=True)


async def test_4_5_several_processes_race_for_the_first_exec(home: Path, runtime: LocalRuntime) -> None:
    box = await runtime.create(IMAGE, detach=True)
    script = (
        "import sys, anyio, hutch\n"
        "async def main(home, box):\n"
        "    async with hutch.Runtime.local(home) as runtime:\n"
        "        r = await (await runtime.get(box)).run('cut', '-d', ' ', '-f', '22', '/proc/1/stat')\n"
        "        print(r.text.strip(), flush=True)\n"
        "anyio.run(main, *sys.argv[1:])\n"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", script, str(home), box.id], stdout=subprocess.PIPE) for _ in range(3)
    ]
    try:
        with in_time(30):
            answers = [(await anyio.to_thread.run_sync(racer.communicate))[0].strip() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert len(set(answers)) == 1, "the box was started more than once"
    assert answers[0]


async def test_4_5_a_stopped_box_is_never_started_by_an_exec(box: LocalBox) -> None:
    await box.stop()
    for action in _uses(box):
        with in_time(), pytest.raises(StoppedError) as caught:
            await action()
        assert (caught.value.code, caught.value.status) == ("stopped", 409)
    assert (await box.info()).state == "stopped"
    await box.start()
    assert (await box.run("echo", "x")).stdout == b"x\n"


async def test_4_5_auto_resume_starts_a_stopped_box(runtime: LocalRuntime) -> None:
    box = await runtime.create(IMAGE, auto_resume=True)
    with in_time():
        await box.files.write("/kept", b"kept")
        await box.stop()
        assert (await box.run("cat", "/kept")).stdout == b"kept"
        await box.stop()
        assert await box.files.read("/kept") == b"kept"


async def test_4_5_a_box_with_a_job_is_never_started_by_an_exec(runtime: LocalRuntime) -> None:
    box = await runtime.create(IMAGE, command=["sh", "-c", "echo ran >> /ran; sleep 0.1"], auto_resume=True)
    for _ in range(2):
        for action in _uses(box):
            with in_time(), pytest.raises((StoppedError, InvalidStateError)):
                await action()
        assert (await box.info()).pid is None
        await box.start()
        with in_time():
            assert await box.wait() == 0
    assert (await box.info()).state == "stopped"


async def test_4_5_a_removed_box_is_not_found(runtime: LocalRuntime) -> None:
    box = await runtime.create(IMAGE)
    await box.start()
    await box.remove(force=True)
    others: tuple[Callable[[], Awaitable[object]], ...] = (
        box.info,
        box.start,
        box.stop,
        box.snapshots.list,
        lambda: runtime.get(box.id),
    )
    for action in (*_uses(box), *others):
        with in_time(), pytest.raises(NotFoundError):
            await action()


async def test_4_5_a_box_removed_by_another_process_is_not_found(home: Path, runtime: LocalRuntime) -> None:
    box = await runtime.create(IMAGE)
    execution = await box.exec("sleep", "60")
    async with LocalRuntime(home) as other:
        await other.remove(box.id, force=True)
    with in_time():
        result = await execution.wait()
        assert (result.exit_code, result.truncated) == (-9, True)
        with pytest.raises(NotFoundError):
            await box.run("true")


async def test_4_6_a_terminal_has_one_merged_stream_of_the_default_size(box: LocalBox) -> None:
    execution = await box.exec(
        *sh("stty size; echo out; echo err >&2; test -t 0 && test -t 1 && test -t 2; echo $?; echo $TERM"), tty=True
    )
    with in_time():
        result = await execution.wait()
        assert await execution.stderr.read() == b""
    assert result.stdout == b"24 80\r\nout\r\nerr\r\n0\r\nxterm\r\n"
    assert result.stderr == b""


async def test_4_6_the_size_is_set_before_the_command_runs_and_can_change(box: LocalBox) -> None:
    script = "stty size; trap 'stty size' WINCH; while :; do sleep 0.02; done"
    execution = await box.exec(*sh(script), tty=True, rows=50, cols=132)
    chunks = aiter(execution.stdout)
    with in_time():
        assert await next_line(chunks) == b"50 132\r\n"
        await anyio.sleep(0.1)
        await execution.resize(30, 100)
        assert await next_line(chunks) == b"30 100\r\n"
        await execution.kill()


async def test_4_6_impossible_sizes_and_missing_terminals(box: LocalBox) -> None:
    for rows, cols in ((0, 80), (24, 0), (-1, 80), (24, 65536)):
        with pytest.raises(InvalidArgumentError):
            await box.exec("true", tty=True, rows=rows, cols=cols)
    plain = await box.exec("sleep", "60")
    with pytest.raises(InvalidArgumentError, match="terminal"):
        await plain.resize(24, 80)
    terminal = await box.exec("sleep", "60", tty=True)
    for rows, cols in ((0, 80), (24, 0)):
        with pytest.raises(InvalidArgumentError):
            await terminal.resize(rows, cols)
    await terminal.kill()
    with in_time():
        await terminal.wait()
    with pytest.raises(InvalidStateError):
        await terminal.resize(24, 80)


async def test_4_6_hangup_and_interrupt_reach_the_terminal(box: LocalBox) -> None:
    execution = await box.exec(
        *sh("trap 'echo int; exit 3' INT; echo up; while :; do sleep 0.02; done"), tty=True, stdin=True
    )
    chunks = aiter(execution.stdout)
    with in_time():
        assert await next_line(chunks) == b"up\r\n"
        await execution.stdin.write(b"\x03")
        rest = b"".join([chunk async for chunk in chunks])
        assert rest.endswith(b"int\r\n")
        assert (await execution.wait()).exit_code == 3


def _uses(box: LocalBox) -> tuple[Callable[[], Awaitable[object]], ...]:
    return (
        lambda: box.run("true"),
        lambda: box.exec("true"),
        lambda: box.files.read("/etc/passwd"),
        lambda: box.files.write("/x", b""),
    )


async def _give_up(box: LocalBox, delay: float) -> None:
    with anyio.move_on_after(delay):
        await box.run("echo", "x")


async def _none_left(box: LocalBox, marker: str) -> bool:
    return not await processes(box, marker)
