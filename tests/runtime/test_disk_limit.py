"""Snapshots, clones, archives and removal of boxes whose disk has a size; and whatever is killed in between."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hutch.engine.container import upper
from hutch.host import loopdisk
from hutch.runtime.runtime import LocalRuntime
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import in_time, sh, until
from tests.runtime.test_box_copies import contents, fill

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox

pytestmark = [pytest.mark.root, pytest.mark.anyio]

SIZE = 64 << 20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quicker to fill."""
    assert loopdisk.problem() == ""
    monkeypatch.setattr(upper, "GB", SIZE)


@pytest.fixture
async def box(runtime: LocalRuntime) -> LocalBox:
    """A running box with a limited disk."""
    box = await runtime.create(IMAGE, disk_gb=1)
    await box.start()
    assert (await box.info()).unenforced == ()
    return box


async def size(box: LocalBox) -> int:
    """How big the box believes its disk to be."""
    return int((await box.run(*sh("df -k / | tail -1"))).text.split()[1]) << 10


def devices(home: Path) -> list[str]:
    """The images below a home that loop devices have."""
    return [str(image) for image in home.glob("boxes/*/disk.img") if loopdisk.attached(image)]


@pytest.mark.parametrize("running", [True, False])
async def test_snapshot_and_restore(runtime: LocalRuntime, box: LocalBox, running: bool) -> None:
    with in_time(30):
        before = await fill(box)
        if not running:
            await box.stop()
        info = await box.snapshots.create("first")
        assert info.size > 0
        await box.start()
        assert await contents(box) == before
        await box.run(*sh("rm -r /data; echo later > /later"))
        await box.stop()
        await box.snapshots.create("second")
        await box.snapshots.restore("first")
        await box.start()
        assert await contents(box) == before
        assert (await box.run("cat", "/later")).exit_code == 1
        assert await size(box) <= SIZE
        await box.stop()
        await box.snapshots.restore("second")
        await box.start()
        assert (await box.run(*sh("cat /later; ls /data"))).stdout == b"later\n"


@pytest.mark.parametrize("running", [True, False])
async def test_a_clone_is_limited_too(runtime: LocalRuntime, box: LocalBox, running: bool) -> None:
    with in_time(30):
        before = await fill(box)
        if not running:
            await box.stop()
        clone = await box.clone("copy")
        assert await contents(clone) == before
        assert (await clone.info()).unenforced == ()
        assert await size(clone) <= SIZE
        full = await clone.run(*sh("cat /dev/zero > /big"))
        assert b"No space left" in full.stderr
        await box.start()
        assert await contents(box) == before
        await box.remove(force=True)
        assert (await clone.run("cat", "/data/d/x")).stdout == b"deep\n"
        await clone.remove(force=True)
        await until(lambda: not devices(runtime.home.root))
        assert os.listdir(runtime.home.boxes) == []
        assert os.listdir(runtime.home.disks) == []


@pytest.mark.parametrize("running", [True, False])
async def test_export_and_import(runtime: LocalRuntime, box: LocalBox, tmp_path: Path, running: bool) -> None:
    with in_time(30):
        before = await fill(box)
        if not running:
            await box.stop()
        await box.export(tmp_path / "box.tar")
        twin = await runtime.import_box(tmp_path / "box.tar", name="twin")
        assert await contents(twin) == before
        assert await size(twin) <= SIZE


async def test_snapshots_do_not_lift_the_limit(runtime: LocalRuntime, box: LocalBox) -> None:
    """What the box has written counts, however often it was saved."""
    with in_time(30):
        for number in range(3):
            await box.run(*sh(f"dd if=/dev/urandom of=/{number} bs=1M count=10"))
            await box.stop()
            await box.snapshots.create(f"s{number}")
            await box.start()
        full = await box.run(*sh("cat /dev/zero > /big; wc -c < /big"))
        assert b"No space left" in full.stderr
        assert int(full.stdout) < SIZE - (30 << 20)
        written = (await box.stats()).disk_bytes
        assert written is not None and 30 << 20 <= written <= SIZE


async def test_an_empty_box_has_snapshots(runtime: LocalRuntime) -> None:
    with in_time():
        box = await runtime.create(IMAGE, disk_gb=1)
        await box.snapshots.create("unborn")
        await box.run(*sh("echo x > /x"))
        await box.stop()
        await box.snapshots.restore("unborn")
        await box.start()
        assert (await box.run("cat", "/x")).exit_code == 1


KILLED = """
import sys, anyio, hutch
from hutch.engine.container import upper
upper.GB = int(sys.argv[3])

async def main(home, box_id):
    async with hutch.Runtime.local(home) as runtime:
        box = await runtime.get(box_id)
        print("ready", flush=True)
        for step in range(1000):
            snapshot = await box.snapshots.create("s")
            clone = await box.clone(None)
            await clone.start()
            await clone.remove(force=True)
            running = (await box.info()).state == "running"
            if running:
                await box.stop()
            await box.snapshots.restore("s")
            await box.snapshots.remove("s")
            if not running:
                await box.start()

anyio.run(main, *sys.argv[1:3])
"""


@pytest.mark.timeout(120)
async def test_killed_at_any_point(home: Path) -> None:
    """A process that saves, clones, restores, stops and starts a box is killed: the next one finds the box's files, and
    nothing else stays."""
    chance = random.Random(5)
    async with LocalRuntime(home) as runtime:
        box = await runtime.create(IMAGE, disk_gb=1, detach=True)
        await box.start()
        before = await fill(box)
        await box.run(*sh("dd if=/dev/urandom of=/bulk bs=1M count=20; md5sum < /bulk > /sum"))
    try:
        for _ in range(8):
            with subprocess.Popen(
                [sys.executable, "-c", KILLED, str(home), box.id, str(SIZE)], stdout=subprocess.PIPE
            ) as victim:
                assert victim.stdout is not None and victim.stdout.readline() == b"ready\n"
                with pytest.raises(subprocess.TimeoutExpired):
                    victim.wait(chance.uniform(0.0, 0.8))
                victim.send_signal(signal.SIGKILL)
            with in_time(60):
                async with LocalRuntime(home) as runtime:
                    box = await runtime.get(box.id)
                    await box.start()
                    assert await contents(box) == before
                    first, second = (await box.run(*sh("md5sum < /bulk; cat /sum"))).text.splitlines()
                    assert first == second
                    for info in await runtime.list():
                        if info.id != box.id:
                            await runtime.remove(info.id, force=True)
                    for snapshot in await box.snapshots.list():
                        await box.snapshots.remove(snapshot.name)
                    await runtime.disks.collect()
                    record = runtime.store.get_box(box.id)
                    assert record is not None
                    assert sorted(os.listdir(runtime.home.disks)) == sorted(record.disks)
                    assert os.listdir(runtime.home.boxes) == [box.id]
                    assert devices(home) == [str(runtime.home.box(box.id) / "disk.img")]
    finally:
        async with LocalRuntime(home) as runtime:
            for info in await runtime.list():
                await runtime.remove(info.id, force=True)
            assert os.listdir(runtime.home.disks) == []
    await until(lambda: not devices(home))
