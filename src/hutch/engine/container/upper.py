"""The writable layer of a box: two folders on the host, ``upper`` and ``work``, or the same two in ``disk.img``, a file
system of a fixed size. The latter is for boxes with a limit, where loop devices can be used; what a box has it keeps.

The file system is written by the kernel alone, so no code of a box ever chooses its bytes.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import anyio.to_thread

from hutch.engine.base import Upper
from hutch.errors import StorageError
from hutch.host import command, files, loopdisk, mapping
from hutch.host.binary import agent_path
from hutch.host.proc import poll_until

if TYPE_CHECKING:
    from collections.abc import Container, Sequence
    from pathlib import Path

IMAGE = "disk.img"
GB = 1 << 30
_SEED = ".seed"


def copier(parent: int) -> list[str]:
    """Return the command (source and target are to follow) that copies a tree and ends with the process ``parent``,
    whose child it is: nobody else would take its result.

    The shell looks whether the parent had died before the signal was asked for.
    """
    watched = ["setpriv", "--pdeathsig", "KILL", "/bin/sh", "-c", 'test "$PPID" = "$1" && shift && exec "$@"', "sh"]
    return [*watched, str(parent), "cp", "-a", "--reflink=auto", "--sparse=auto", "-T", "--"]


async def prepare(directory: Path, disk_gb: int | None, ids: mapping.Mapping) -> None:
    """Make what is missing. Raises `StorageError`, `OSError`."""
    if limited(directory):
        if not loopdisk.attached(directory / IMAGE):
            await loopdisk.repair(directory / IMAGE)
        return
    if disk_gb is None or (directory / "upper").exists() or ids.rootless or loopdisk.problem():
        _make_folders(directory, ids)
        return
    seed = directory / _SEED
    files.remove_tree(seed)
    seed.mkdir(mode=0o700)
    _make_folders(seed, ids)
    await loopdisk.make(directory / IMAGE, disk_gb * GB, seed)
    files.remove_tree(seed)


def _make_folders(directory: Path, ids: mapping.Mapping) -> None:
    for name in ("upper", "work"):
        path, made = f"{directory}/{name}", f"{directory}/.{name}"
        if os.path.lexists(path):
            continue
        with contextlib.suppress(FileExistsError):
            os.mkdir(made, 0o755)
        if not ids.rootless:
            os.chown(made, ids.owner, ids.owner)
        os.rename(made, path)  # under its name only once it is complete: we may die at any step


def limited(directory: Path) -> bool:
    """Whether the size of the layer is limited."""
    return (directory / IMAGE).exists()


def configuration(directory: Path) -> list[tuple[str, str]]:
    """Return the launcher's records for the layer (agent/launch.h)."""
    if limited(directory):
        return [("disk", str(directory / IMAGE)), ("upper", "disk/upper"), ("work", "disk/work")]
    return [("upper", str(directory / "upper")), ("work", str(directory / "work"))]


async def released(directory: Path, timeout: float) -> None:
    """Wait until nothing uses the image any more, at most ``timeout`` seconds: the kernel takes mounts away behind the
    last process, and writes first what is not written yet. A later start may come before that."""
    if limited(directory):
        await poll_until(lambda: not loopdisk.attached(directory / IMAGE), timeout)


def kind(directory: Path) -> Upper:
    """See `hutch.engine.base.Engine.upper`."""
    if limited(directory):
        return Upper.FIXED
    try:
        with os.scandir(directory / "upper") as entries:
            return Upper.EMPTY if next(entries, None) is None else Upper.MOVABLE
    except FileNotFoundError:
        return Upper.EMPTY
    except PermissionError:  # the box's root has closed it
        return Upper.MOVABLE


async def move(directory: Path, target: Path) -> None:
    """See `hutch.engine.base.Engine.move_upper`. Raises `StorageError`."""
    try:
        os.rename(directory / "upper", target)
    except PermissionError:  # its owner is another user of the box
        await _mapped(["mv", "-T", "--", str(directory / "upper"), str(target)], f"move the disk of {directory}")
    except OSError as error:
        raise StorageError(f"cannot move the disk of {directory} to {target}: {error.strerror}") from error
    await remove_tree(directory / "work")


async def copy(directory: Path, target: Path) -> None:
    """See `hutch.engine.base.Engine.copy_upper`. Raises `StorageError`."""
    if not limited(directory):
        await copy_tree(directory / "upper", target)
        return
    point = directory / "run"
    mounted = (str(agent_path()), "disk", str(directory / IMAGE), str(point), "--")
    await _copy([*mounted, *copier(os.getpid()), str(point / "upper"), str(target)], directory, target)


async def reset(directory: Path) -> None:
    """See `hutch.engine.base.Engine.reset_upper`. Raises `StorageError`."""
    for name in ("upper", "work", IMAGE):
        await remove_tree(directory / name)


async def size(directory: Path) -> int:
    """See `hutch.engine.base.Engine.upper_size`."""
    try:
        return (directory / IMAGE).stat().st_blocks * 512
    except FileNotFoundError:
        return await tree_size(directory / "upper")


async def tree_size(path: Path) -> int:
    """See `hutch.engine.base.Engine.tree_size`."""
    # Files come and go while it looks at a box that runs, so its exit code means nothing.
    output = await _mapped(["du", "-s", "-B1", "--", str(path)], f"measure {path}", accepted=range(256))
    number = output.partition(b"\t")[0]
    return int(number) if number.isdigit() else 0


async def remove_tree(path: Path) -> None:
    """See `hutch.engine.base.Engine.remove_tree`. Raises `StorageError`."""
    if mapping.current().rootless:
        await _mapped(["rm", "-rf", "--", str(path)], f"remove {path}")
    else:
        await anyio.to_thread.run_sync(files.remove_tree, path)


async def copy_tree(source: Path, target: Path) -> None:
    """See `hutch.engine.base.Engine.copy_tree`. Raises `StorageError`."""
    await _copy(mapping.current().wrap([*copier(os.getpid()), str(source), str(target)]), source, target)


async def _copy(argv: Sequence[str], source: Path, target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise StorageError(f"cannot copy to {target}: it exists")
    try:
        await command.run(argv, f"copy {source} to {target}")
    except BaseException:
        with anyio.CancelScope(shield=True):
            await remove_tree(target)
        raise


async def _mapped(argv: Sequence[str], what: str, *, accepted: Container[int] = (0,)) -> bytes:
    return await command.run(mapping.current().wrap(argv), what, accepted=accepted)
