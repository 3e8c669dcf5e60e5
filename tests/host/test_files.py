"""Atomic replacement, locks, removal."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import pytest

from hutch.errors import DeadlineError, StorageError
from hutch.host import files


def test_readers_see_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    old, new = b"o" * 200_000, b"n" * 200_000
    files.atomic_write(path, old)
    stop = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(50):
        files.atomic_write(path, new)
        files.atomic_write(path, old)
    stop.set()
    reader.join()
    assert seen <= {old, new}


def test_replacement_leaves_no_temporary_file(tmp_path: Path) -> None:
    files.atomic_write(tmp_path / "file", b"x", mode=0o640, durable=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    with pytest.raises(StorageError, match="absent"):
        files.atomic_write(tmp_path / "absent/file", b"x")


def test_replacement_of_a_symlink_replaces_the_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / "link").symlink_to("target")
    files.atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"kept"
    assert not (tmp_path / "link").is_symlink()


def test_a_lock_excludes(tmp_path: Path) -> None:
    order: list[str] = []

    async def hold(name: str, held: anyio.Event, leave: anyio.Event) -> None:
        async with files.locked(tmp_path / "lock", timeout=5):
            order.append(f"{name} in")
            held.set()
            await leave.wait()
            order.append(f"{name} out")

    async def main() -> None:
        first, second, leave = anyio.Event(), anyio.Event(), anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold, "a", first, leave)
            await first.wait()
            with pytest.raises(DeadlineError):
                async with files.locked(tmp_path / "lock", timeout=0.02):
                    pass
            tasks.start_soon(hold, "b", second, leave)
            leave.set()
        assert order == ["a in", "a out", "b in", "b out"]

    anyio.run(main)


def test_shared_locks_go_together(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            files.locked(tmp_path / "lock", timeout=1, shared=True),
            files.locked(tmp_path / "lock", timeout=1, shared=True),
        ):
            with pytest.raises(DeadlineError):
                async with files.locked(tmp_path / "lock", timeout=0.01):
                    pass

    anyio.run(main)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.flock(f,fcntl.LOCK_EX); print('held',flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"

        async def main() -> None:
            with pytest.raises(DeadlineError):
                async with files.locked(tmp_path / "lock", timeout=0.02):
                    pass
            holder.kill()
            async with files.locked(tmp_path / "lock", timeout=5):
                pass

        anyio.run(main)


def test_the_newest_come_first_and_the_deleted_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")  # as one that is deleted between a look at the folder and one at it
    for name, when in (("old", 1), ("new", 3), ("middle", 2)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (when, when))
    assert [path.name for path in files.newest_first(tmp_path.iterdir())] == ["new", "middle", "old"]


SCRATCH = """
import pathlib, sys, time
import anyio
from hutch.host import files
async def main():
    async with files.scratch(pathlib.Path(sys.argv[1]), "dead") as folder:
        (folder / "file").write_text("half of it")
        print("made", flush=True)
        await anyio.sleep(100)
anyio.run(main)
"""


def test_what_the_dead_have_not_completed_is_removed(tmp_path: Path) -> None:
    """And nothing of the living, in this process or in others."""
    (tmp_path / ".other").mkdir()
    (tmp_path / "complete").mkdir()

    async def main() -> None:
        async with files.scratch(tmp_path, "mine") as mine:
            with subprocess.Popen([sys.executable, "-c", SCRATCH, str(tmp_path)], stdout=subprocess.PIPE) as maker:
                assert maker.stdout is not None and maker.stdout.readline() == b"made\n"
                (theirs,) = tmp_path.glob(".dead.*")
                async with files.scratch(tmp_path, "more") as more:
                    (more / "file").touch()
                assert mine.exists() and not more.exists() and (theirs / "file").exists()
                maker.kill()
            async with files.scratch(tmp_path, "next") as done:
                done.rename(tmp_path / "done")
            assert mine.exists() and not theirs.exists()

    anyio.run(main)
    assert {path.name for path in tmp_path.iterdir()} == {".other", "complete", "done"}


def test_remove_tree(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep/link").symlink_to(kept)
    (tree / "loop").symlink_to(tree)
    os.mkfifo(tree / "fifo")
    files.remove_tree(tree)
    files.remove_tree(tree)
    assert kept.read_text() == "kept"
    (tmp_path / "link").symlink_to(kept)
    files.remove_tree(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_deep_and_wide_tree_is_removed(tmp_path: Path) -> None:
    """With few descriptors and the usual stack."""
    tree = tmp_path / "tree"
    tree.mkdir()
    fd = os.open(tree, os.O_RDONLY)
    for depth in range(3000):
        os.mkdir("d", dir_fd=fd)
        if depth % 100 == 0:
            for number in range(5):
                Path(f"/proc/self/fd/{fd}/side{number}/under").mkdir(parents=True)
            os.symlink("d", "link", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit[1]))
    try:
        files.remove_tree(tree)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert list(tmp_path.iterdir()) == []
