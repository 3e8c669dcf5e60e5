"""Folders whose files may belong to the users of boxes: measured, copied and removed by whoever may do so."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from hutch.errors import StorageError
from hutch.host import command, files, mapping

if TYPE_CHECKING:
    from collections.abc import Container, Sequence
    from pathlib import Path


def copier(parent: int) -> list[str]:
    """Return the command (source and target are to follow) that copies a tree and ends with the process ``parent``,
    whose child it is: nobody else would take its result.

    The shell looks whether the parent had died before the signal was asked for.
    """
    watched = ["setpriv", "--pdeathsig", "KILL", "/bin/sh", "-c", 'test "$PPID" = "$1" && shift && exec "$@"', "sh"]
    return [*watched, str(parent), "cp", "-a", "--reflink=auto", "--sparse=auto", "-T", "--"]


async def tree_size(path: Path) -> int:
    """See `hutch.engine.base.Engine.tree_size`."""
    # Files come and go while it looks at a box that runs, so its exit code means nothing.
    output = await run_mapped(["du", "-s", "-B1", "--", str(path)], f"measure {path}", accepted=range(256))
    number = output.partition(b"\t")[0]
    return int(number) if number.isdigit() else 0


async def remove_tree(path: Path) -> None:
    """See `hutch.engine.base.Engine.remove_tree`. Raises `StorageError`."""
    if mapping.current().rootless:
        await run_mapped(["rm", "-rf", "--", str(path)], f"remove {path}")
    else:
        await anyio.to_thread.run_sync(files.remove_tree, path)


async def copy_tree(source: Path, target: Path) -> None:
    """See `hutch.engine.base.Engine.copy_tree`. Raises `StorageError`."""
    await copy_by(mapping.current().wrap([*copier(os.getpid()), str(source), str(target)]), source, target)


async def copy_by(argv: Sequence[str], source: Path, target: Path) -> None:
    """Run a command that copies. Raises `StorageError`; nothing of the target stays then."""
    if target.exists() or target.is_symlink():
        raise StorageError(f"cannot copy to {target}: it exists")
    try:
        await command.run(argv, f"copy {source} to {target}")
    except BaseException:
        with anyio.CancelScope(shield=True):
            await remove_tree(target)
        raise


async def run_mapped(argv: Sequence[str], what: str, *, accepted: Container[int] = (0,)) -> bytes:
    """Run a command as the root of this user's boxes. Raises `StorageError`."""
    return await command.run(mapping.current().wrap(argv), what, accepted=accepted)
