"""Boxes whose disk has a size: what is written stays within it, and nothing of the machinery is left or seen."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import anyio
import pytest

from hutch.engine.base import Lower, Upper
from hutch.engine.container import ContainerEngine, upper
from hutch.errors import StorageError
from hutch.host import loopdisk, proc
from hutch.types import Limits
from tests.engine.boxes import Box, plan, running

pytestmark = [pytest.mark.anyio, pytest.mark.root]

LIMITED = Limits(disk_gb=1)
SIZE = 64 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quicker to fill."""
    assert loopdisk.problem() == ""
    monkeypatch.setattr(upper, "GB", SIZE)


def image(directory: Path) -> Path:
    return directory / "disk.img"


def loops(directory: Path) -> list[str]:
    """The loop devices that have the box's image, looked up another way than the program does."""
    found = []
    for name in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if str(image(directory)) in name.read_text():
                found.append(name.parts[3])
        except OSError:
            continue  # just released
    return found


async def test_a_full_disk_is_the_boxs_alone(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(container, plan(tmp_path / "box", rootfs, limits=LIMITED)) as box:
        assert box.started.unenforced == ()
        output = await box.sh("cat /dev/urandom > /big; df -k / | tail -1")
        assert "No space left on device" in output.err
        assert SIZE * 0.6 < int(output.out.split()[1]) * 1024 < SIZE
        assert (tmp_path / "box/disk.img").stat().st_blocks * 512 <= SIZE
        assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
        assert len(loops(box.directory)) == 1
        output = await box.sh("rm /big && echo small > /kept; stat -c %u:%g /kept; cat /kept")
        assert output.out == "0:0\nsmall\n"


async def test_the_size_is_what_was_asked_for(
    container: ContainerEngine, rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    async with running(container, plan(tmp_path / "box", rootfs, limits=Limits(disk_gb=3))) as box:
        size = int((await box.sh("df -k / | tail -1")).out.split()[1]) * 1024
        assert 0.9 * (3 << 30) < size <= 3 << 30
        assert image(box.directory).stat().st_size == 3 << 30
        assert await container.upper_size(box.directory) < 8 << 20
        assert int((await box.sh("df -i / | tail -1")).out.split()[1]) >= 300_000


async def test_files_survive_and_the_device_goes(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    box_plan = plan(tmp_path / "box", rootfs, limits=LIMITED)
    async with running(container, box_plan) as box:
        await box.sh("echo kept > /root/file; rm /etc/release; mkdir /new; dd if=/dev/zero of=/dirty bs=1M count=30")
    assert loops(box_plan.directory) == []
    async with running(container, box_plan) as box:
        output = await box.sh("cat /root/file; test ! -e /etc/release && test -d /new && echo yes; wc -c < /dirty")
        assert output.out == f"kept\nyes\n{30 << 20}\n"
    await container.remove_tree(box_plan.directory)
    assert loops(box_plan.directory) == []


async def test_the_box_sees_nothing_of_it(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(container, plan(tmp_path / "box", rootfs, limits=LIMITED)) as box:
        output = await box.sh(
            "ls /sys/devices/virtual/block; ls /disk /stage 2>/dev/null; cat /sys/block/loop*/loop/* 2>/dev/null;"
            f"grep -rl disk.img /proc/mounts /proc/self/mountinfo; ls -d /lost+found {tmp_path} 2>/dev/null;"
            "mknod /loop b 7 0 && echo made"
        )
        assert output.out == "", output


async def test_the_layer_can_be_copied(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    """Frozen and stopped: owners, modes, links, deletions come along, and the copy is a layer for another box."""
    box_plan = plan(tmp_path / "box", rootfs, limits=LIMITED)
    assert container.upper(box_plan.directory) is Upper.EMPTY
    async with running(container, box_plan) as box:
        await box.sh(
            "cd /root && echo data > a && ln a b && ln -s /etc/passwd link && chown 1000:50 a && chmod 4711 a &&"
            "mkfifo fifo && rm /etc/release && rm -r /home && mkdir /home"
        )
        assert container.upper(box.directory) is Upper.FIXED
        await box.spawn("while true; do date +%N > /tmp/clock; done")
        await container.freeze(box.directory)
        await container.copy_upper(box.directory, tmp_path / "running")
        assert len(loops(box.directory)) == 1, "a second device would not see what the first has not written yet"
        await container.thaw(box.directory)
        with pytest.raises(StorageError, match="exists"):
            await container.copy_upper(box.directory, tmp_path / "running")
    await container.copy_upper(box_plan.directory, tmp_path / "stopped")
    assert loops(box_plan.directory) == []
    for name in ("running", "stopped"):
        frozen = Lower(tmp_path / name, owned_by_box=True)
        async with running(container, plan(tmp_path / f"on-{name}", rootfs, lowers=[frozen])) as other:
            output = await other.sh(
                "cd /root; stat -c '%a %u:%g %h' a; readlink link; test -p fifo && echo fifo;"
                "test -e /etc/release || echo gone; ls /home"
            )
            assert output.out == "4711 1000:50 2\n/etc/passwd\nfifo\ngone\n"


async def test_a_failed_copy_leaves_nothing(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    box_plan = plan(tmp_path / "box", rootfs, limits=LIMITED)
    async with running(container, box_plan):
        pass
    with image(box_plan.directory).open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(StorageError, match="disk"):
        await container.copy_upper(box_plan.directory, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert loops(box_plan.directory) == []


async def test_reset(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    box_plan = plan(tmp_path / "box", rootfs, limits=LIMITED)
    async with running(container, box_plan) as box:
        await box.sh("echo old > /old")
    for _ in range(2):
        await container.reset_upper(box_plan.directory)
        assert container.upper(box_plan.directory) is Upper.EMPTY
        assert await container.upper_size(box_plan.directory) == 0
    async with running(container, box_plan) as box:
        assert box.started.unenforced == ()
        assert (await box.sh("test -e /old || echo gone")).out == "gone\n"


async def test_many_take_devices_at_once(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    """More than there are at first; each box has its own."""
    plans = [plan(tmp_path / f"box{number}", rootfs, limits=LIMITED) for number in range(12)]

    async def start(number: int) -> None:
        started = await container.start(plans[number])
        box = Box(plans[number].directory, plans[number], started, container)
        assert (await box.sh(f"echo {number} > /mine")).status == 0

    try:
        async with anyio.create_task_group() as tasks:
            for number in range(len(plans)):
                tasks.start_soon(start, number)
        devices = [loops(box_plan.directory) for box_plan in plans]
        assert all(len(found) == 1 for found in devices)
        assert len({found[0] for found in devices}) == len(plans)
    finally:
        for box_plan in plans:
            await container.kill(box_plan.directory)
    for number, box_plan in enumerate(plans):
        await container.copy_upper(box_plan.directory, tmp_path / f"copy{number}")
        assert (tmp_path / f"copy{number}/mine").read_text() == f"{number}\n"


async def test_a_start_while_the_last_mount_goes(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    """The kernel still writes for the box that has ended when it is started, and copied, again: one device, one
    truth."""
    box_plan = plan(tmp_path / "box", rootfs, limits=LIMITED)
    for step in range(4):
        async with running(container, box_plan) as box:
            if step:
                output = await box.sh("md5sum < /data; cat /sum")
                first, second = output.out.splitlines()
                assert first == second
            await box.sh("dd if=/dev/urandom of=/data bs=1M count=20 2>/dev/null; md5sum < /data > /sum")
            os.kill(box.started.pid, signal.SIGKILL)
            assert await proc.poll_until(lambda: not container.observe(box_plan.directory).running, 5)
            await container.copy_upper(box.directory, tmp_path / f"copy{step}")
            assert (tmp_path / f"copy{step}/data").stat().st_size == 20 << 20
            started = await container.start(box_plan)
            again = Box(box.directory, box_plan, started, container)
            first, second = (await again.sh("md5sum < /data; cat /sum")).out.splitlines()
            assert first == second
            assert len(loops(box.directory)) == 1


async def test_without_loop_devices_it_is_told(
    container: ContainerEngine, rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And such a box stays what it is."""
    box_plan = plan(tmp_path / "box", rootfs, limits=LIMITED)
    with monkeypatch.context() as patch:
        patch.setattr(loopdisk, "problem", lambda: "no loop devices")
        async with running(container, box_plan) as box:
            assert box.started.unenforced == ("disk",)
            await box.sh("echo kept > /kept")
        assert container.upper(box_plan.directory) is Upper.MOVABLE
    async with running(container, box_plan) as box:
        assert box.started.unenforced == ("disk",)
        assert (await box.sh("cat /kept")).out == "kept\n"


async def test_a_disk_with_errors_is_repaired(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    """What the kernel marks when it cannot write, because the host's disk is full, is made good at the next start."""
    box_plan = plan(tmp_path / "box", rootfs, limits=LIMITED)
    async with running(container, box_plan) as box:
        await box.sh("echo kept > /kept")
    disk = str(image(box_plan.directory))
    await anyio.run_process(["/usr/sbin/tune2fs", "-E", "force_fsck", disk])
    async with running(container, box_plan) as box:
        assert (await box.sh("cat /kept")).out == "kept\n"
    shown = await anyio.run_process(["/usr/sbin/dumpe2fs", "-h", disk])
    assert b"Filesystem state:         clean\n" in shown.stdout
    await anyio.run_process(["/usr/sbin/tune2fs", "-E", "force_fsck", disk])
    with image(box_plan.directory).open("r+b") as file:
        file.seek(4096)  # the group descriptors
        file.write(os.urandom(4096))
        file.seek(SIZE // 2)
        file.truncate()
    with pytest.raises(StorageError, match="e2fsck"):
        await container.start(box_plan)


async def test_a_full_host_is_an_error_in_the_box(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    """And no more than that: the box can be stopped, and goes on when there is room."""
    (tmp_path / "small").mkdir()
    await anyio.run_process(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(tmp_path / "small")])
    try:
        box_plan = plan(tmp_path / "small/box", rootfs, limits=LIMITED)
        async with running(container, box_plan) as box:
            output = await box.sh("echo kept > /kept; dd if=/dev/urandom of=/big bs=1M count=40 conv=fsync && echo all")
            assert "all" not in output.out and output.err
        await anyio.run_process(["mount", "-o", "remount,size=100m", str(tmp_path / "small")])
        async with running(container, box_plan) as box:
            assert (await box.sh("rm -f /big; echo more >> /kept && tail -1 /kept")).out == "more\n"
    finally:
        await anyio.run_process(["umount", str(tmp_path / "small")])


async def test_a_box_without_a_limit_has_no_image(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(container, plan(tmp_path / "box", rootfs)) as box:
        await box.sh("echo x > /x")
        assert not image(box.directory).exists()
        assert container.upper(box.directory) is Upper.MOVABLE


async def test_what_mkfs_says_is_told(
    container: ContainerEngine, rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loopdisk, "_OPTIONS", ("-q", "-t", "ext4", "-b", "17"))
    box_plan = plan(tmp_path / "box", rootfs, limits=LIMITED)
    with pytest.raises(StorageError, match="block size"):
        await container.start(box_plan)
    assert not image(box_plan.directory).exists()
    monkeypatch.undo()
    monkeypatch.setattr(upper, "GB", SIZE)
    async with running(container, box_plan) as box:
        assert box.started.unenforced == ()
        assert {path.name for path in box.directory.iterdir()} == {
            "disk.img",
            "run",
            "main.log.0",
            "main.log.1",
            "exit",
        }


@pytest.mark.parametrize("milliseconds", [0, 1, 3, 6, 9, 12, 16, 20, 30, 45])
def test_sigkill_in_the_middle(rootfs: Path, tmp_path: Path, milliseconds: float) -> None:
    """Of the process that starts the box. Whatever is left goes with `kill`, and the box can be started."""
    container = ContainerEngine()
    box_plan = plan(tmp_path / "box", rootfs, limits=LIMITED)
    ready, signal_ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(signal_ready, b"r")
            anyio.run(container.start, box_plan)
        finally:
            signal.pause()
            os._exit(1)
    os.read(ready, 1)
    time.sleep(milliseconds / 1000)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(signal_ready)

    async def start_again() -> None:
        await container.kill(box_plan.directory)
        async with running(container, box_plan) as box:
            assert box.started.unenforced == ()
            assert (await box.sh("echo x > /x && cat /x")).out == "x\n"
            assert len(loops(box.directory)) == 1

    anyio.run(start_again)
    assert loops(box_plan.directory) == []
    anyio.run(container.remove_tree, box_plan.directory)
