"""A home whose file system is full: errors that say so, nothing half left, and boxes that can be ended."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from hutch.errors import HutchError, ResourceExhaustedError
from hutch.host.proc import Process
from hutch.runtime.runtime import LocalRuntime
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import in_time, sh

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.anyio]


@pytest.fixture
def small_home(tmp_path: Path, images: Path) -> Iterator[Path]:
    """A home on a file system of 8 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "small", str(place)], check=True)
    try:
        home = place / "home"
        home.mkdir(mode=0o700)
        (home / "images").symlink_to(images)
        yield home
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


async def test_a_box_that_filled_the_disk(small_home: Path, tmp_path: Path) -> None:
    async with LocalRuntime(small_home) as runtime:
        box = await runtime.create(IMAGE)
        await box.run(*sh("dd if=/dev/zero of=/fill bs=64k"))
        assert (await box.run("echo", "on")).text == "on\n"
        with pytest.raises(ResourceExhaustedError, match="No space"):
            await box.files.write("/file", b"x" * 100_000)
        for call in (
            lambda: box.snapshots.create("s"),
            box.clone,
            lambda: box.export(small_home / "archive"),
            lambda: runtime.create(IMAGE),
            lambda: runtime.volumes.create("volume"),
        ):
            with pytest.raises(HutchError, match=r"full|No space"), in_time():
                await call()
        assert os.listdir(small_home / "disks") == []
        assert os.listdir(small_home / "volumes") == []
        assert not (small_home / "archive").exists()
        await box.run("rm", "/fill")
        await box.snapshots.create("s")
        await box.remove(force=True)


async def test_a_box_that_filled_the_disk_can_be_stopped(small_home: Path) -> None:
    async with LocalRuntime(small_home) as runtime:
        box = await runtime.create(IMAGE)
        await box.run(*sh("dd if=/dev/zero of=/fill bs=64k"))
        pid = (await box.info()).pid
        with in_time():
            await box.stop(timeout=0.5)
        assert pid is not None
        assert Process.of(pid) is None
        await box.remove(force=True)
        assert (await (await runtime.create(IMAGE)).run("true")).ok


async def test_a_failed_export_leaves_no_layer(home: Path, tmp_path: Path) -> None:
    async with LocalRuntime(home) as runtime:
        box = await runtime.create(IMAGE)
        await box.run("touch", "/x")
        with pytest.raises(HutchError):
            await box.export(tmp_path / "no such folder" / "archive")
        assert os.listdir(home / "disks") == []
