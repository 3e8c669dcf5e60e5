"""Run a command of the host to its end."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import anyio

from hutch.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Container, Sequence
    from pathlib import Path


async def run(
    command: Sequence[str], what: str, *, accepted: Container[int] = (0,), cwd: str | Path | None = None
) -> bytes:
    """Run a command that does ``what`` and return what it wrote. ``accepted``: the exit codes that mean success.

    Raises `StorageError` with its last words.
    """
    if shutil.which(command[0]) is None:
        raise StorageError(f"cannot {what}: {command[0]} is not installed")
    done = await anyio.run_process(
        command, check=False, stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"}, cwd=cwd
    )
    if done.returncode not in accepted:
        words = done.stderr or done.stdout
        raise StorageError(f"cannot {what}: {words.decode(errors='replace').strip()[-400:]}")
    return done.stdout
