"""Files on the host: atomic replacement, locks, removal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from typing import TYPE_CHECKING

import anyio

from hutch.errors import DeadlineError, StorageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


def atomic_write(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = False) -> None:
    """Replace the file at ``path``: readers see the old contents or the new, never a part. ``durable``: survives a
    power cut.

    Raises `StorageError`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(fd, "wb", buffering=0) as file:
            file.write(data)
            if durable:
                os.fsync(fd)
        temporary.replace(path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def sync_directory(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.asynccontextmanager
async def locked(path: Path, *, timeout: float, shared: bool = False) -> AsyncIterator[None]:
    """Hold a lock between processes and tasks (flock(2) on ``path``, which is made when absent and stays). ``timeout``
    in seconds.

    Raises `DeadlineError` when others hold it for too long.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout
        pause = 0.001
        while not _try_lock(fd, shared=shared):
            if time.monotonic() > deadline:
                raise DeadlineError(f"the lock {path} is held by another process for more than {timeout:g} s")
            await anyio.sleep(pause)
            pause = min(pause * 2, 0.05)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int, *, shared: bool) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_tree(path: Path) -> None:
    """Delete a folder, a file or a symlink, without following symlinks. Idempotent.

    Raises `StorageError`.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"cannot remove {error.filename or path}: {error.strerror}") from error
