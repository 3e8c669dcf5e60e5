"""Nothing survives a host process that is killed in the middle of a start, but for what a later `kill` finds and
removes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.engine import trees
from hutch.engine.container import ContainerEngine
from tests.engine.boxes import plan

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.root


def _members(box_id: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state = (entry / "stat").read_text().rpartition(") ")[2][0]
            if state != "Z" and f"/{box_id}" in (entry / "cgroup").read_text():
                found.append(int(entry.name))
        except (OSError, IndexError):
            continue
    return found


def _wait(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@pytest.mark.parametrize("milliseconds", [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 12])
def test_sigkill_in_the_middle(rootfs: Path, tmp_path: Path, milliseconds: float) -> None:
    engine = ContainerEngine()
    box_plan = plan(tmp_path / "box", rootfs)
    ready, signal_ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(signal_ready, b"r")
            anyio.run(engine.start, box_plan)
        finally:
            signal.pause()
            os._exit(1)
    os.read(ready, 1)
    time.sleep(milliseconds / 1000)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(signal_ready)

    # A box that was committed lives on and is found; any other one goes away by itself.
    assert _wait(lambda: engine.observe(box_plan.directory).running or not _members(box_plan.box_id))
    anyio.run(engine.kill, box_plan.directory)
    assert not engine.observe(box_plan.directory).running
    assert _wait(lambda: not _members(box_plan.box_id))
    assert not list(Path("/sys/fs/cgroup").glob(f"*/hutch/{box_plan.box_id}"))
    run = box_plan.directory / "run"
    assert not run.exists() or not any(run.iterdir())


def test_a_box_outlives_its_creator(rootfs: Path, tmp_path: Path) -> None:
    """The process that started it ends; another one finds the box, and no mount shows on the host."""
    engine = ContainerEngine()
    box_plan = plan(tmp_path / "box", rootfs)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(tmp_path, os.O_RDONLY), 77)  # inheritable, and none of the box's business
        anyio.run(engine.start, box_plan)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    try:
        observed = engine.observe(box_plan.directory)
        assert observed.running and observed.pid is not None
        assert str(box_plan.directory) not in Path("/proc/self/mounts").read_text()
        descriptors = {str(link.readlink()) for link in Path(f"/proc/{observed.pid}/fd").iterdir()}
        ours = {str(box_plan.directory / name) for name in ("main.log.0", "main.log.1", "exit")}
        foreign = {
            name
            for name in descriptors - ours
            if not name.startswith(("anon_inode:", "socket:")) and name != "/dev/null"
        }
        assert foreign == set()
    finally:
        anyio.run(engine.kill, box_plan.directory)


def test_a_copier_whose_parent_has_died_copies_nothing(tmp_path: Path) -> None:
    """The parent may die before the copier has asked for the signal that would end it."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("text")
    for parent, copied in ((os.getppid(), False), (os.getpid(), True)):
        target = tmp_path / f"copy{copied}"
        done = subprocess.run([*trees.copier(parent), tmp_path / "tree", target], check=False)
        assert (done.returncode == 0, target.exists()) == (copied, copied)
