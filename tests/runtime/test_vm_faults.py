"""VMs whose emulator hangs, forks whose maker dies, exports of what runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from hutch.errors import EngineError, UpstreamUnavailableError
from hutch.runtime.runtime import LocalRuntime
from hutch.types import BoxState, Mount, NetPolicy, PublishedPort
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import in_time, sh

pytestmark = [pytest.mark.root, pytest.mark.anyio]


@pytest.fixture
def isolation() -> str:
    return "vm"


def emulator(keeper: int | None) -> int:
    """The keeper's only child."""
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text())


async def test_a_box_that_could_not_be_copied_can_be_ended(
    runtime: LocalRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its emulator neither stops for the copy nor goes on: both fail, and the box is not held by that."""
    monkeypatch.setattr("hutch.engine.vm.engine.SYNC_SECONDS", 0.5)
    box = await runtime.create(IMAGE)
    for ended in (BoxState.STOPPED, None):
        await box.start()
        os.kill(emulator((await box.info()).pid), signal.SIGSTOP)
        with in_time(28):
            with pytest.raises(UpstreamUnavailableError):
                await box.snapshots.create("never")
            await (box.stop(timeout=0.5) if ended else box.remove(force=True))
        if ended:
            assert (await box.info()).state is ended


FORKER = """
import os, signal, sys
import anyio, hutch
from hutch.runtime.lives import Lives
async def die(self, record):
    os.kill(os.getpid(), signal.SIGKILL)
Lives.serve_network = die
async def main():
    async with hutch.Runtime.local(sys.argv[1]) as runtime:
        await (await runtime.get(sys.argv[2])).fork("child")
anyio.run(main)
"""


async def test_a_fork_goes_on_from_its_memory_once(runtime: LocalRuntime, home: Path) -> None:
    """Also when its maker dies as soon as it runs: what it writes from then on is not undone by its next start."""
    parent = await runtime.create(IMAGE)
    await parent.run("touch", "/dev/shm/memory")
    done = await anyio.run_process([sys.executable, "-c", FORKER, str(home), parent.id], check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    child = await runtime.get("child")
    with in_time(40):
        assert (await child.run("ls", "/dev/shm/memory")).exit_code == 0
        await child.run(*sh("echo written > /disk; sync"))
        await child.restart()
        assert (await child.run("cat", "/disk")).text == "written\n"
        assert (await child.run("ls", "/dev/shm/memory")).exit_code != 0


async def test_the_export_of_a_running_box_is_not_in_its_way(runtime: LocalRuntime, tmp_path: Path) -> None:
    """The box that reads the disk has neither its ports nor its mounts."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("of the host\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = PublishedPort(port=80, host_port=probe.getsockname()[1])
    mounts = [Mount(source=str(tmp_path / "folder"), target="/data")]
    box = await runtime.create(IMAGE, mounts=mounts, network=NetPolicy(ports=(port,)))
    with in_time(40):
        assert (await box.run("cat", "/data/file")).text == "of the host\n"
        await box.export(tmp_path / "box.tar")
        (tmp_path / "folder").rename(tmp_path / "away")
        await box.stop()
        await box.export(tmp_path / "again.tar")
        twin = await runtime.import_box(tmp_path / "box.tar", name="twin")
        assert (await twin.run("ls", "-A", "/data")).text == ""


async def test_a_fork_that_the_disk_has_no_room_for(tmp_path: Path, images: Path, vm_store: Path) -> None:
    """It fails, nothing of it stays, and the box goes on."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "small", str(place)], check=True)
    try:
        (place / "images").symlink_to(images)
        (place / "vm").symlink_to(vm_store)
        async with LocalRuntime(place) as runtime:
            box = await runtime.create(IMAGE, isolation="vm", memory_mib=256)
            await box.run(*sh("dd if=/dev/urandom of=/dev/shm/file bs=1M count=64"))
            with pytest.raises(EngineError, match="move the machine's state"), in_time(30):
                await box.fork()
            assert (await box.run("echo", "on")).text == "on\n"
            assert (os.listdir(place / "boxes"), os.listdir(place / "disks")) == ([box.id], [])
            assert (await box.info()).state is BoxState.RUNNING
            await box.remove(force=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
