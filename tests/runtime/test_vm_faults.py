"""VMs whose emulator hangs or is gone at the wrong moment, and forks whose maker dies."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import UpstreamUnavailableError
from hutch.types import BoxState
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import in_time, sh

if TYPE_CHECKING:
    from hutch.runtime.runtime import LocalRuntime

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
