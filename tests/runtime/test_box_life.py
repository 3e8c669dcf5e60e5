"""Boxes: names, listing, logs, several processes on one home, recovery, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from hutch.errors import AlreadyExistsError, HutchError, InvalidArgumentError, InvalidStateError, NotFoundError
from hutch.runtime.home import new_id
from hutch.runtime.runtime import LocalRuntime
from hutch.types import BoxState
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import Sink, in_time, sh, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hutch.runtime.box import LocalBox

pytestmark = [pytest.mark.root, pytest.mark.anyio]

MAIN_SCRIPT = (
    "for i in 1 2 3 4 5; do echo out$i; echo err$i >&2; done; "
    "until [ -e /gate ]; do sleep 0.02; done; echo last; exit 3"
)
MAIN = ["sh", "-c", MAIN_SCRIPT]


async def test_names_labels_and_prefixes(runtime: LocalRuntime) -> None:
    first = await runtime.create(IMAGE, name="first", labels={"a": "1", "b": "2"})
    second = await runtime.create(IMAGE, name="second", labels={"a": "1"})
    with pytest.raises(AlreadyExistsError, match="first"):
        await runtime.create(IMAGE, name="first")
    assert [info.name for info in await runtime.list()] == ["first", "second"]
    assert [info.name for info in await runtime.list(labels={"a": "1", "b": "2"})] == ["first"]
    assert await runtime.list(labels={"a": "2"}) == []
    for key in ("first", first.id, first.id[:8]):
        assert (await runtime.get(key)).id == first.id
    with pytest.raises(NotFoundError):
        await runtime.get("third")
    with pytest.raises(NotFoundError):
        await runtime.create("no-such-image:1", pull="never")
    for name in ("", "-x", "a/b", "..", "x" * 129, "a b", "é"):
        with pytest.raises(InvalidArgumentError):
            await runtime.create(IMAGE, name=name)
    await second.start()
    with pytest.raises(InvalidStateError, match="force"):
        await runtime.remove("second")
    await runtime.remove("second", force=True)
    await runtime.remove("first")
    assert await runtime.list() == []


async def test_the_same_box_id_makes_one_box(runtime: LocalRuntime) -> None:
    box_id = new_id()
    made: list[str] = []

    async def make() -> None:
        made.append((await runtime.create(IMAGE, name="once", labels={"a": "b"}, box_id=box_id)).id)

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(make)
    assert made == 4 * [box_id]
    assert [info.id for info in await runtime.list()] == [box_id]
    with pytest.raises(AlreadyExistsError, match="made otherwise"):
        await runtime.create(IMAGE, name="other", box_id=box_id)
    with pytest.raises(InvalidArgumentError, match="12 letters and digits"):
        await runtime.create(IMAGE, box_id="../../escape")
    assert [info.name for info in await runtime.list()] == ["once"]


async def test_main_command_logs_and_exit_code(runtime: LocalRuntime) -> None:
    box = await runtime.create(IMAGE, command=MAIN)
    with in_time():
        await box.start()
        await box.start()
        await until(lambda: _lines(box, 10))
        streams = {"stdout": b"", "stderr": b""}
        async for entry in box.logs():
            streams[entry.stream] += entry.data
        assert streams["stdout"] == b"out1\nout2\nout3\nout4\nout5\n"
        assert streams["stderr"] == b"err1\nerr2\nerr3\nerr4\nerr5\n"
        followed = bytearray()

        async def follow() -> None:
            async for entry in box.logs(follow=True):
                followed.extend(entry.data)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            tasks.start_soon(follow)
            await anyio.sleep(0.2)
            await box.files.write("/gate", b"")
        assert sorted(followed.split()) == sorted(
            [*[s + b"%d" % n for n in range(1, 6) for s in (b"out", b"err")], b"last"] * 2
        )
        assert await box.wait() == 3
    info = await box.info()
    assert (info.state, info.exit_code, info.pid) == ("stopped", 3, None)
    tail = b"".join([entry.data async for entry in box.logs(tail=1)])
    assert tail == b"last\n"
    assert [entry async for entry in box.logs(tail=0)] == []
    assert b"".join([entry.data async for entry in box.logs(tail=1000)]).count(b"\n") == 11
    # A new life has a new log.
    with in_time():
        await box.start()
        assert await box.wait() == 3
        assert b"".join([entry.data async for entry in box.logs()]).count(b"last\n") == 1


async def test_killing_the_main_command_ends_the_box(runtime: LocalRuntime) -> None:
    box = await runtime.create(IMAGE, command=["sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.02; done"])
    with in_time():
        with pytest.raises(InvalidStateError):
            await box.kill()
        await box.start()
        await until(lambda: _lines(box, 1))
        await box.kill(signal.SIGTERM)
        assert await box.wait() == 7
        await box.start()
        await box.kill()
        assert (await box.info()).state == "stopped"


async def test_two_processes_share_a_home(home: Path, runtime: LocalRuntime) -> None:
    box = await runtime.create(IMAGE, name="shared")
    await box.files.write("/f", b"from one")
    async with LocalRuntime(home) as other:
        twin = await other.get("shared")
        with in_time():
            assert await twin.files.read("/f") == b"from one"
            execution = await box.exec(*sh("echo started; sleep 0.3; echo ended; exit 5"))
            watched = await twin.attach(execution.id)
            assert (await watched.wait()).stdout == b"started\nended\n"
            assert (await execution.wait()).exit_code == 5
            await twin.stop()
            assert (await box.info()).state == "stopped"
            await box.start()
            assert (await twin.run("cat", "/f")).stdout == b"from one"
    # The other runtime did not start the box, so its end does not stop it.
    assert (await box.info()).state == "running"


async def test_closing_stops_what_it_started_unless_detached(home: Path) -> None:
    async with LocalRuntime(home) as runtime:
        kept = await runtime.create(IMAGE, detach=True)
        stopped = await runtime.create(IMAGE)
        removed = await runtime.create(IMAGE, auto_remove=True)
        for box in (kept, stopped, removed):
            await box.run("true")
    async with LocalRuntime(home) as runtime:
        states = {info.id: info.state for info in await runtime.list()}
        assert states == {kept.id: "running", stopped.id: "stopped"}
        for box_id in states:
            await runtime.remove(box_id, force=True)


HOST = """
import sys, anyio, hutch
async def main(home, image):
    async with hutch.Runtime.local(home) as runtime:
        for number in range(1000):
            box = await runtime.create(image, name=f"b{number}")
            print(box.id, flush=True)
            await box.run("sleep", "0.01")
            await box.remove(force=True)
anyio.run(main, *sys.argv[1:])
"""


async def test_killed_hosts_leave_a_home_that_the_next_one_puts_in_order(home: Path) -> None:
    """SIGKILL at arbitrary moments of create, start, exec and remove."""
    made: set[str] = set()
    for number in range(8):
        host = subprocess.Popen([sys.executable, "-c", HOST, str(home), IMAGE], stdout=subprocess.PIPE)
        assert host.stdout is not None
        try:
            with in_time(20):
                made.add((await anyio.to_thread.run_sync(host.stdout.readline)).decode().strip())
                await anyio.sleep(0.002 + 0.007 * number)
        finally:
            host.kill()
            host.wait()
            made.update(host.stdout.read().decode().split())
            host.stdout.close()
        with in_time(20):
            async with LocalRuntime(home) as runtime:
                for info in await runtime.list():
                    assert info.state in ("configured", "running", "stopped", "failed"), info
                    box = await runtime.get(info.id)
                    if info.state in ("configured", "running"):
                        assert (await box.run("echo", "alive")).stdout == b"alive\n"
                    else:
                        await box.start()
                        assert (await box.run("echo", "alive")).stdout == b"alive\n"
                    await box.remove(force=True)
                assert list(runtime.home.boxes.iterdir()) == []
                assert list(runtime.home.disks.iterdir()) == []
    assert [path for path in _cgroups() if Path(path).name in made] == []
    assert str(home) not in Path("/proc/self/mountinfo").read_text()


async def test_a_box_that_was_killed_from_outside_is_marked_with_the_reason(
    runtime: LocalRuntime, box: LocalBox
) -> None:
    pid = (await box.info()).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with in_time():
        await until(lambda: _is(box, "failed"))
        info = await box.info()
        assert info.pid is None
        assert info.reason
        await box.start()
        assert (await box.run("echo", "again")).stdout == b"again\n"


async def test_removing_leaves_nothing(runtime: LocalRuntime, box: LocalBox) -> None:
    assert [path for path in _cgroups() if box.id in path], "where are the control groups?"
    execution = await box.exec(*sh("trap '' TERM; sleep 68.1 & sleep 68.2 & while :; do sleep 1; done"))
    await box.files.write("/f", b"x")
    await box.snapshots.create("s")
    namespace = str(Path(f"/proc/{(await box.info()).pid}/ns/pid").readlink())
    assert _in_namespace(namespace)
    with in_time():
        await box.remove(force=True)
        assert (await execution.wait()).exit_code == -9
    assert _in_namespace(namespace) == []
    assert not [path for path in _cgroups() if box.id in path]
    assert list(runtime.home.boxes.iterdir()) == []
    assert list(runtime.home.disks.iterdir()) == []
    assert not runtime.home.lock(box.id).exists()
    assert str(runtime.home.root) not in Path("/proc/self/mountinfo").read_text()
    assert runtime.channels._channels == {}


async def test_stop_start_keeps_files_and_stop_is_idempotent(box: LocalBox) -> None:
    with in_time():
        await box.files.write("/kept", b"1")
        await box.run(*sh("rm /etc/release"))
        for _ in range(2):
            await box.stop()
            await box.stop()
            assert (await box.info()).state == "stopped"
            await box.start()
        assert await box.files.read("/kept") == b"1"
        assert (await box.run("cat", "/etc/release")).exit_code == 1


async def test_racing_life_and_death(runtime: LocalRuntime) -> None:
    """Whatever the order, each call ends, with a result or a typed error, and the box is in one piece."""

    async def attempt(action: Callable[[], Awaitable[object]]) -> None:
        with contextlib.suppress(HutchError):
            await action()

    for _ in range(3):
        box = await runtime.create(IMAGE)
        with in_time(30):
            async with anyio.create_task_group() as tasks:
                for action in (
                    box.start,
                    lambda b=box: b.run("true"),
                    lambda b=box: b.stop(timeout=0.1),
                    box.info,
                    lambda b=box: b.kill(9),
                    lambda b=box: b.files.write("/x", b"x"),
                    lambda b=box: b.restart(timeout=0.1),
                    lambda b=box: b.snapshots.create("s"),
                    box.stats,
                ):
                    tasks.start_soon(attempt, action)
            await box.start()
            assert (await box.run("echo", "whole")).stdout == b"whole\n"
            await box.remove(force=True)


async def _is(box: LocalBox, state: str) -> bool:
    return (await box.info()).state == state


async def _lines(box: LocalBox, count: int) -> bool:
    return b"".join([entry.data async for entry in box.logs()]).count(b"\n") >= count


def _cgroups() -> list[str]:
    """The control groups of all boxes on this machine. Others may come and go meanwhile."""
    found = []
    for hierarchy in Path("/sys/fs/cgroup").iterdir():
        with contextlib.suppress(OSError):
            found += [str(hierarchy / "hutch" / name) for name in os.listdir(hierarchy / "hutch")]
    return found


def _in_namespace(namespace: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if str((process / "ns/pid").readlink()) == namespace and state not in "ZX":
                found.append(f"{process.name} {state}")
        except OSError:
            continue
    return found


async def test_a_paused_box_stands_still_until_it_is_resumed(runtime: LocalRuntime, box: LocalBox) -> None:
    ticks = Sink()
    await box.exec(*sh("while :; do echo tick; sleep 0.02; done"), stdout=ticks)
    with in_time():
        await ticks.called.wait()
    for _ in range(2):
        await box.pause()
    assert [info.state for info in await runtime.list()] == [BoxState.PAUSED]
    for use in (box.run("true"), box.files.read("/etc/hostname"), box.executions(), box.start()):
        with pytest.raises(InvalidStateError, match="paused"):
            await use
    await box.snapshots.create("still")
    assert (await box.info()).state is BoxState.PAUSED
    before = len(ticks.data)
    await anyio.sleep(0.5)  # nothing happens, which gives no event
    assert len(ticks.data) == before
    for _ in range(2):
        await box.resume()
    await until(lambda: len(ticks.data) > before)
    assert abs(int((await box.run("date", "+%s")).text) - time.time()) < 2
    await box.pause()
    with in_time():
        await box.stop(timeout=2)
    assert (await box.info()).state is BoxState.STOPPED
    with pytest.raises(InvalidStateError, match="does not run"):
        await box.pause()
    await box.start()
    assert (await box.run("echo", "again")).text == "again\n"
    await box.pause()
    with in_time(4):
        await box.remove(force=True)


PAUSER = """
import sys, anyio, hutch
async def main():
    async with hutch.Runtime.local(sys.argv[1]) as runtime:
        await (await runtime.get(sys.argv[2])).pause()
        print("paused", flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


async def test_a_box_whose_pauser_was_killed_can_be_resumed(home: Path, box: LocalBox) -> None:
    with subprocess.Popen([sys.executable, "-c", PAUSER, str(home), box.id], stdout=subprocess.PIPE) as pauser:
        assert pauser.stdout is not None
        assert await anyio.to_thread.run_sync(pauser.stdout.readline) == b"paused\n"
        pauser.kill()
    with pytest.raises(InvalidStateError, match="paused"):
        await box.run("true")
    await box.resume()
    assert (await box.run("echo", "resumed")).text == "resumed\n"
