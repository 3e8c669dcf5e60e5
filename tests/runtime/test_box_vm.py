"""What boxes that are VMs can beyond others, and what they tell."""

from __future__ import annotations

import hashlib
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

from hutch.errors import EngineError, InvalidStateError, UnsupportedError, UpstreamUnavailableError
from hutch.host import kvm
from hutch.host.proc import boot_id
from hutch.runtime.runtime import LocalRuntime
from hutch.types import BoxState, Mount
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import Sink, in_time, next_line, sh, until

if TYPE_CHECKING:
    from hutch.runtime.box import LocalBox

pytestmark = [pytest.mark.root, pytest.mark.anyio]


@pytest.fixture
def isolation() -> str:
    return "vm"


async def test_memory_that_ran_out_in_a_vm_is_told(runtime: LocalRuntime) -> None:
    """Of the command that it ran out for, and of no other."""
    box = await runtime.create(IMAGE, memory_mib=128)
    assert (await box.run(*sh("exit 1"))).oom_killed is False
    result = await box.run(*sh("tail /dev/zero"), timeout=40)
    assert result.exit_code in (137, -9) and result.oom_killed
    later = await box.run(*sh("kill -SEGV $$"))
    assert (later.exit_code, later.oom_killed) == (-11, False)
    assert (await box.stats()).oom_kills == 1


async def test_a_fork_goes_on_where_its_parent_is(runtime: LocalRuntime) -> None:
    """With all that runs, and as a box of its own: other entropy, other names, its own disk, the right time."""
    parent = await runtime.create(IMAGE)
    with pytest.raises(InvalidStateError, match="does not run"):
        await parent.fork()
    await parent.run(*sh("echo common > /disk; echo common > /dev/shm/memory"))
    ticks = Sink()
    ticking = await parent.exec(*sh("while :; do echo tick; sleep 0.02; done"), stdout=ticks)
    counting = await parent.exec(*sh("echo begun; read word; echo got $word; exit 7"), stdin=True)
    assert await next_line(aiter(counting.stdout)) == b"begun\n"
    await until(lambda: len(ticks.data) > 0)
    child = await parent.fork("child")
    assert (child.name, (await child.info()).state) == ("child", BoxState.RUNNING)
    for box, word in ((parent, "parent"), (child, "child")):
        assert (await box.run("cat", "/disk", "/dev/shm/memory")).text == "common\ncommon\n"
        await box.run(*sh(f"echo {word} > /disk"))
        assert abs(int((await box.run("date", "+%s")).text) - time.time()) < 2
        assert (await box.run("hostname")).text == f"{box.name or box.id}\n"
    facts = {}
    for box in (parent, child):
        facts[box.id] = [
            (await box.run(*sh("head -c 16 /dev/urandom | od -An -tx1"))).text,
            (await box.run("cat", "/etc/machine-id")).text,
        ]
    assert not set(facts[parent.id]) & set(facts[child.id])
    # The command goes on in both, under one id.
    known = {execution.id for execution in await child.executions()}
    assert {ticking.id, counting.id} <= known
    twin = await child.attach(counting.id)
    await twin.stdin.write(b"child\n")
    await counting.stdin.write(b"parent\n")
    assert (await twin.wait()).stdout == b"begun\ngot child\n"
    assert (await counting.wait()).exit_code == 7
    before = len(ticks.data)
    await until(lambda: len(ticks.data) > before)
    await parent.remove(force=True)
    grandchild = await child.fork()
    await child.restart(timeout=1)
    for box in (child, grandchild):
        assert (await box.run("cat", "/disk")).text == "child\n"
    await grandchild.pause()
    with pytest.raises(InvalidStateError, match="paused"):
        await grandchild.fork()


async def test_a_fork_in_the_middle_of_traffic_costs_no_byte(runtime: LocalRuntime) -> None:
    """Nothing of what is on its way between host and guest gets into the fork, and nothing of it is lost. The main
    command goes on in both, and comes to its own end in each."""
    box = await runtime.create(IMAGE, command=sh("until [ -e /gate ]; do sleep 0.05; done; echo ended; exit 5"))
    await box.start()
    numbers = Sink()
    data = os.urandom(2 << 20)
    counting = await box.exec("seq", "1", "200000", stdout=numbers)
    sums = []

    async def feed() -> None:
        sums.append((await box.run("md5sum", input=data, timeout=120)).text)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(feed)
        await numbers.called.wait()
        child = await box.fork()
        await child.run("touch", "/gate")
        with in_time():
            assert await child.wait() == 5
        assert [entry.data async for entry in child.logs()] == [b"ended\n"]
    with in_time(60):
        await counting.wait()
    assert bytes(numbers.data) == b"".join(b"%d\n" % number for number in range(1, 200001))
    assert sums == [f"{hashlib.md5(data).hexdigest()}  -\n"]


HOLDER = """
cd /data/deep; exec 3< lines 4>> log 5< gone 6< swapped 7< /vol/lines
read one <&3; read one <&7; rm gone; touch /ready
until [ -e /gate ]; do sleep 0.05; done
echo $(cat <&3)$(cat <&7) $(cat here) $(cat <&5 2>&1) $(cat <&6 2>&1); hostname >&4
"""


async def test_a_fork_takes_its_mounts_along(runtime: LocalRuntime, tmp_path: Path) -> None:
    """Files that are open, working directories, traffic: all goes on in both boxes, over the same files. What cannot be
    found again is stale there, and never another file."""
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for name in ("lines", "gone", "swapped", "here"):
        (folder / "deep" / name).write_text(f"first\n{name}\n")
    (folder / "many").mkdir()  # more than one message tells of
    for number in range(1100):
        (folder / "many" / f"{number:0250}").touch()
    volume = await runtime.volumes.create("shared")
    mounts = [Mount(source=str(folder), target="/data"), Mount(volume=volume.name, target="/vol", read_only=True)]
    parent = await runtime.create(IMAGE, name="parent", mounts=mounts)
    writer = await runtime.create(IMAGE, mounts=[Mount(volume=volume.name, target="/vol")], isolation="container")
    await writer.run(*sh("printf 'first\\nvolume\\n' > /vol/lines"))
    assert (await parent.run(*sh("find /data/many -type f -size 0 | wc -l"))).text == "1100\n"
    traffic = "while echo $(hostname) >> /data/busy/ticks; do ls /data >/dev/null; done"
    await parent.exec(*sh(f"mkdir /data/busy; {traffic}"))
    holder = await parent.exec(*sh(HOLDER))
    await parent.run(*sh("until [ -e /ready ]; do sleep 0.05; done"))
    (folder / "deep/new").write_text("another\n")
    (folder / "deep/new").rename(folder / "deep/swapped")
    with in_time(60):
        child = await parent.fork("child")
        grandchild = await child.fork("grandchild")
    said, ticks = [], folder / "busy/ticks"
    for box in (parent, child, grandchild):
        twin = holder if box is parent else await box.attach(holder.id)
        await box.run("touch", "/gate")
        with in_time():
            said.append((await twin.wait()).text)
        await until(lambda name=box.name: f"{name}\n" in ticks.read_text()[-2000:])  # type: ignore[misc]
    stale = "linesvolume first here" + 2 * " cat: read error: Stale file handle"
    assert said == ["linesvolume first here first gone first swapped\n", f"{stale}\n", f"{stale}\n"]
    assert (folder / "deep/log").read_text() == "parent\nchild\ngrandchild\n"
    assert (folder / "deep/swapped").read_text() == "another\n"
    await child.run(*sh("echo child > /data/new; echo no > /vol/no"))
    assert (await parent.run("cat", "/data/new")).text == "child\n"
    assert (await writer.run("ls", "/vol")).text == "lines\n"


async def test_mounts_that_do_not_answer_hold_up_no_fork_for_ever(runtime: LocalRuntime, tmp_path: Path) -> None:
    """It fails in time, and the box goes on; once their server is dead nothing is missing that was there."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("text\n")
    box = await runtime.create(IMAGE, mounts=[Mount(source=str(folder), target="/data")])
    await box.start()
    keeper = (await box.info()).pid
    below = map(int, Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split())
    (server,) = (pid for pid in below if Path(f"/proc/{pid}/comm").read_text() == "box-files\n")
    os.kill(server, signal.SIGSTOP)
    reader = await box.exec("cat", "/data/file")
    with in_time(20):
        for _ in range(2):
            with pytest.raises(EngineError, match="does not come to rest"):
                await box.fork()
        os.kill(server, signal.SIGCONT)
        assert (await reader.wait()).text == "text\n"
        fork = await box.fork()
        assert (await fork.run("cat", "/data/file")).text == "text\n"
        os.kill(server, signal.SIGKILL)
        assert not (await box.run("cat", "/data/file")).ok
        last = await box.fork()
        assert not (await last.run("cat", "/data/file")).ok
    assert {info.state for info in await runtime.list()} == {BoxState.RUNNING}


FORKER = """
import sys, anyio, hutch
async def main():
    async with hutch.Runtime.local(sys.argv[1]) as runtime:
        box = await runtime.get(sys.argv[2])
        print("begun", flush=True)
        await box.fork()
anyio.run(main)
"""


async def test_a_forker_that_is_killed_leaves_its_box_running(runtime: LocalRuntime, home: Path) -> None:
    box = await runtime.create(IMAGE)
    await box.run("touch", "/dev/shm/memory")
    for delay in (0.1, 0.8):
        with subprocess.Popen([sys.executable, "-c", FORKER, str(home), box.id], stdout=subprocess.PIPE) as forker:
            assert forker.stdout is not None
            assert await anyio.to_thread.run_sync(forker.stdout.readline) == b"begun\n"
            await anyio.sleep(delay)  # somewhere in the middle
            forker.kill()
        with in_time():
            assert (await box.info()).state is BoxState.RUNNING
            assert (await box.run("ls", "/dev/shm/memory")).exit_code == 0
            assert abs(int((await box.run("date", "+%s")).text) - time.time()) < 2
    await box.remove(force=True)
    for info in await runtime.list():
        await runtime.remove(info.id, force=True)
    async with LocalRuntime(home):
        assert list(runtime.home.boxes.iterdir()) == list(runtime.home.disks.iterdir()) == []


async def test_containers_are_not_forked(runtime: LocalRuntime) -> None:
    box = await runtime.create(IMAGE, isolation="container")
    await box.start()
    with pytest.raises(UnsupportedError, match="clone"):
        await box.fork()
    assert (await box.info()).state is BoxState.RUNNING


def emulator(keeper: int | None) -> int:
    """The keeper's only child."""
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text())


def _mib(pid: int, name: str) -> int:
    """What the kernel says of a process's memory."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) >> 10


async def test_faults_of_the_emulator_are_told(runtime: LocalRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was killed makes the box a failed one, with the reason and what the console said; one that hangs
    fails what is asked of it, and can be stopped, killed and removed. Nobody waits for ever."""
    killed, frozen = [await runtime.create(IMAGE) for _ in range(2)]
    waiting = await killed.exec("sleep", "1000")
    os.kill(emulator((await killed.info()).pid), signal.SIGKILL)
    with in_time():
        assert (await waiting.wait()).exit_code == -9
        info = await killed.info()
        assert info.state is BoxState.FAILED and "the emulator ended" in (info.reason or "")
        await killed.start()
        assert (await killed.run("echo", "again")).text == "again\n"
    waiting = await frozen.exec("sleep", "1000")
    monkeypatch.setattr("hutch.runtime.channel._ANSWER_SECONDS", 0.5)
    monkeypatch.setattr("hutch.engine.vm.engine.SYNC_SECONDS", 0.5)
    for ended in (BoxState.STOPPED, None):
        if ended is None:
            await frozen.start()
        os.kill(emulator((await frozen.info()).pid), signal.SIGSTOP)
        with pytest.raises(UpstreamUnavailableError, match="did not answer"), in_time():
            await frozen.run("true")
        with in_time(20):
            await (frozen.stop(timeout=0.5) if ended else frozen.remove(force=True))
        if ended:
            assert (await frozen.info()).state is ended
            with in_time():
                assert (await waiting.wait()).exit_code == -9


async def test_auto_is_a_vm_where_kvm_works(
    runtime: LocalRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a container elsewhere; who asks for one of them gets it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "hutch").mkdir()
    for answer, chosen in (("yes", "vm"), ("no", "container")):
        (tmp_path / "hutch/kvm").write_text(f"{boot_id()} {os.geteuid()} {answer}")
        kvm.usable.cache_clear()
        for asked, given in (("auto", chosen), ("vm", "vm"), ("container", "container")):
            assert (await (await runtime.create(IMAGE, isolation=asked)).info()).isolation == given
        assert (await runtime.info())["isolation"] == chosen
    kvm.usable.cache_clear()


async def test_several_vms_at_once(runtime: LocalRuntime) -> None:
    """They share what they do not change: together they take less than they have been promised."""
    boxes = [await runtime.create(IMAGE) for _ in range(6)]
    said: dict[str, str] = {}

    async def use(box: LocalBox) -> None:
        said[box.id] = (await box.run(*sh("hostname; sleep 0.2"), timeout=60)).text

    with in_time(60):
        async with anyio.create_task_group() as tasks:
            for box in boxes:
                tasks.start_soon(use, box)
    assert said == {box.id: f"{box.id}\n" for box in boxes}
    taken = [_mib(emulator((await box.info()).pid), "Pss") for box in boxes]
    assert sum(taken) < len(boxes) * 200


async def test_memory_that_the_guest_frees_goes_back_to_the_host(runtime: LocalRuntime, vm_store: Path) -> None:
    """And nothing of it is taken out of the template that it shares with other boxes."""
    box = await runtime.create(IMAGE)
    await box.start()
    pid = emulator((await box.info()).pid)

    def own_mib() -> int:
        return _mib(pid, "Private_Dirty")

    templates = {path: path.stat().st_blocks for path in (vm_store / "templates").glob("*/memory")}
    before = own_mib()
    fill = await box.run(*sh("dd if=/dev/zero of=/dev/shm/file bs=1M count=200"), timeout=60)
    assert fill.exit_code == 0 and own_mib() > before + 180
    await box.run("rm", "/dev/shm/file")
    await until(lambda: own_mib() < before + 60)
    assert all(path.stat().st_blocks >= blocks for path, blocks in templates.items())
