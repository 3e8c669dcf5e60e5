"""Files on the host: atomic replacement, locks, removal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from hutch.errors import DeadlineError, StorageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

PARTIAL = ".part"
"""Ends the names of folders that are not complete."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def atomic_write(path: Path | str, data: bytes, *, mode: int = 0o600, durable: bool = False) -> None:
    """Replace the file at ``path``: readers see the old contents or the new, never a part. ``durable``: survives a
    power cut.

    Raises `StorageError`.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(6)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(fd, "wb", buffering=0) as file:
            file.write(data)
            if durable:
                os.fsync(fd)
        os.replace(temporary, path)
        if durable:
            sync_directory(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def sync_directory(path: Path | str) -> None:
    """Make the names in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.asynccontextmanager
async def locked(path: Path, *, timeout: float, shared: bool = False) -> AsyncIterator[None]:
    """Hold a lock between processes and tasks (flock(2) on ``path``, which is made when absent and stays).
    ``timeout`` in seconds.

    Raises `DeadlineError` when others hold it for too long, `StorageError`.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"cannot open the lock {path}: {error.strerror}") from error
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


@contextlib.asynccontextmanager
async def scratch(folder: Path, name: str) -> AsyncIterator[Path]:
    """Make a folder in ``folder`` for what is not complete yet, and delete at the end what is still there. The folders
    of processes that died, whatever their names, are deleted as well.

    Raises `OSError`, `StorageError`.
    """
    path = folder / f".{name}.{secrets.token_hex(4)}{PARTIAL}"
    with contextlib.ExitStack() as held:
        lock = os.open(folder, _DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # or one that is being made might be taken for one of the dead
            obsolete = [path, *(left for left in folder.glob(f".*{PARTIAL}") if _seize(left, held))]
            path.mkdir(mode=0o700)
            _seize(path, held)
        finally:
            os.close(lock)
        try:
            yield path
        finally:
            with anyio.CancelScope(shield=True):
                for left in obsolete:
                    await anyio.to_thread.run_sync(remove_tree, left)


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sort by the time of the last change, without those that others have deleted meanwhile."""
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def _seize(path: Path, held: contextlib.ExitStack) -> bool:
    """Lock a folder if nobody has it, until ``held`` is closed."""
    try:
        fd = os.open(path, _DIRECTORY)
    except FileNotFoundError:
        return False
    held.callback(os.close, fd)
    return _try_lock(fd, shared=False)


def remove_tree(path: Path) -> None:
    """Delete a folder, a file or a symlink, without following symlinks. Idempotent. The folder may be as deep as it
    likes: neither stack, nor descriptors, nor paths grow with it. Nobody else moves folders in it meanwhile.

    Raises `StorageError`.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            _empty(os.open(path, _DIRECTORY))
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror}") from error


def _empty(fd: int) -> None:
    """Delete what is in a directory, and close it."""
    name = ""  # of the directory that is open, in the one above it
    above: list[tuple[str, list[str]]] = []
    try:
        below = _remove_files(fd)
        while True:
            if below:
                fd = _exchange(fd, below[-1])
                above.append((name, below))
                name = below.pop()
                below = _remove_files(fd)
            elif above:
                fd = _exchange(fd, "..")
                os.rmdir(name, dir_fd=fd)
                name, below = above.pop()
            else:
                return
    finally:
        os.close(fd)


def _remove_files(fd: int) -> list[str]:
    """Delete all but the directories in a directory, and return their names."""
    below = []
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                below.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=fd)
    return below


def _exchange(fd: int, name: str) -> int:
    """Open another directory as seen from this one, and close this one."""
    other = os.open(name, _DIRECTORY, dir_fd=fd)
    os.close(fd)
    return other
