"""Copies of files: many at once, cut off at any moment, of things that cannot be copied."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import HutchError, InvalidArgumentError
from tests.runtime.helpers import in_time, sh

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox

pytestmark = [pytest.mark.root, pytest.mark.anyio]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_more_copies_at_once_than_there_are_threads(box: LocalBox, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2 << 20))
    with in_time(30):
        async with anyio.create_task_group() as tasks:
            for number in range(48):
                tasks.start_soon(box.files.put, source, f"/root/{number}")
    sums = await box.run(*sh("md5sum /root/* | cut -c1-32 | uniq | wc -l; ls /root | wc -l"))
    assert sums.text.split() == ["1", "48"]


@pytest.mark.parametrize("direction", ["get", "put"])
async def test_a_copy_that_is_cancelled_ends_at_once(box: LocalBox, tmp_path: Path, direction: str) -> None:
    await box.run(*sh("dd if=/dev/zero of=/root/big bs=1M count=200"))
    with (tmp_path / "big").open("wb") as file:
        file.truncate(4 << 30)

    async def copy() -> None:
        if direction == "get":
            await box.files.get("/root/big", tmp_path / "copy")
        else:
            await box.files.put(tmp_path / "big", "/root/copy")

    await box.files.write("/root/small", b"")
    before = descriptors()
    for pause in (0.0, 0.001, 0.005, 0.02, 0.05):
        with in_time(5), anyio.move_on_after(pause):
            await copy()
    with in_time(5):
        while descriptors() > before:
            gc.collect()
            await anyio.sleep(0.01)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".hutch")]
    assert (await box.run("true")).ok


async def test_a_special_file_is_refused_and_not_passed_over(box: LocalBox, tmp_path: Path) -> None:
    await box.run("mkfifo", "/root/fifo")
    for path in ("/root/fifo", "/dev/zero"):
        with pytest.raises(InvalidArgumentError, match="cannot be copied"), in_time():
            await box.files.get(path, tmp_path / "copy")
    assert os.listdir(tmp_path) == ["home"] or not (tmp_path / "copy").exists()


async def test_a_tree_deeper_than_any_path_can_be_taken_away(box: LocalBox, tmp_path: Path) -> None:
    dig = "i=0; while [ $i -lt 1800 ]; do mkdir d && cd d || break; i=$((i+1)); done"
    await box.run(*sh(dig), cwd="/root")
    with pytest.raises(HutchError), in_time(20):
        await box.files.get("/root/d", tmp_path / "copy")
    with in_time(20):
        assert (await box.stats()).memory_bytes != 0
        await box.remove(force=True)
    await anyio.run_process(["rm", "-rf", str(tmp_path / "copy")])
