"""A home whose files were spoilt."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from hutch.errors import HutchError, InvalidArgumentError
from hutch.host.proc import Process
from hutch.runtime.runtime import LocalRuntime
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import in_time, sh

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox

pytestmark = [pytest.mark.root, pytest.mark.anyio]


@pytest.mark.parametrize("junk", [b"", b"\xff\xfe\0", b"{}", b'{"group": {"members": 5}}'])
async def test_a_box_whose_run_record_is_lost_does_not_live_on(box: LocalBox, home: Path, junk: bytes) -> None:
    pid = (await box.info()).pid
    assert pid is not None
    (home / "boxes" / box.id / "run" / "state.json").write_bytes(junk)
    with in_time():
        assert (await box.info()).state == "failed"
    assert Process.of(pid) is None
    await box.start()
    assert (await box.run("true")).ok


async def test_logs_of_garbage(runtime: LocalRuntime, home: Path) -> None:
    job = await runtime.create(IMAGE, command=sh("echo hi; sleep 100"))
    await job.start()
    for name in ("main.log.0", "main.log.1", "exit"):
        (home / "boxes" / job.id / name).write_bytes(os.urandom(4000))
    with in_time():
        assert [entry async for entry in job.logs()] == []
        await job.remove(force=True)


async def test_a_box_whose_folder_or_layers_are_gone_can_be_removed(runtime: LocalRuntime, home: Path) -> None:
    box = await runtime.create(IMAGE)
    await box.run("touch", "/x")
    await box.stop(timeout=0)
    await box.snapshots.create("s")
    for layer in (home / "disks").iterdir():
        shutil.rmtree(layer)
    with pytest.raises(HutchError):
        await box.start()
    shutil.rmtree(home / "boxes" / box.id)
    await box.remove()
    assert os.listdir(home / "boxes") == []


@pytest.mark.parametrize("odd", [5, b"/tmp", "/tmp/\0", "/tmp/" + "x" * 300])
async def test_a_home_that_cannot_be(odd: str) -> None:
    with pytest.raises(InvalidArgumentError):
        async with LocalRuntime(odd):
            pass


async def test_a_home_with_an_odd_name(images: Path, tmp_path: Path) -> None:
    home = tmp_path / (' ünï "x" \\ :,=;' + "long" * 45)
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images)
    async with LocalRuntime(home) as runtime:
        box = await runtime.create(IMAGE)
        assert (await box.run("echo", "x")).text == "x\n"
        await box.remove(force=True)
