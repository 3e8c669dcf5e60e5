"""The programs that touch layer content: they run where the owners of the files can be set.

As root that is here; otherwise a user namespace in which the user's own and subordinate ids are mapped.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final

import anyio

from hutch.errors import StorageError
from hutch.host import mapping
from hutch.host.binary import agent_path

if TYPE_CHECKING:
    from pathlib import Path

ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
}


def unpack_argv(target: Path, *, max_bytes: int, max_entries: int) -> list[str]:
    """Return the command that unpacks the plain tar on its standard input into ``target``, as an overlay layer."""
    ids = mapping.current()
    flags = ["--userxattr"] if ids.rootless else []
    if ids.single:
        flags.append("--single-id")
    limits = [f"--max-bytes={max_bytes}", f"--max-entries={max_entries}"]
    return ids.wrap([str(agent_path()), "unpack", "--dest", str(target), "--layer", *flags, *limits])


def pack_argv(source: Path) -> list[str]:
    """Return the command that writes ``source`` to its standard output as a tar."""
    return [str(agent_path()), "pack", "--source", str(source)]


async def remove_tree(path: Path) -> None:
    """Delete a folder that may hold files of mapped users. Idempotent, never follows a symlink."""
    argv = mapping.current().wrap(["rm", "-rf", "--one-file-system", "--", str(path)])
    done = await anyio.run_process(argv, check=False, env=ENVIRONMENT, stderr=subprocess.PIPE)
    if done.returncode != 0:
        cause = done.stderr.decode("utf-8", "replace")[-300:].strip()
        raise StorageError(f"{path} cannot be deleted: {cause}")
