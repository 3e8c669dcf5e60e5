"""Unix sockets in a folder, however long its path is: an address holds 108 bytes, so it goes by way of the folder's
descriptor."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def listen(folder: Path | str, name: str) -> socket.socket:
    """Return a listening socket with this name in the folder, in the place of what has it. Raises `OSError`."""
    directory = _open(folder)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
        listener.bind(f"/proc/self/fd/{directory}/{name}")
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener


def connect(folder: Path | str, name: str) -> socket.socket:
    """Return a connected non-blocking socket. Raises `OSError`: `BlockingIOError` when the listener's queue is
    full."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        directory = _open(folder)
        try:
            connection.connect(f"/proc/self/fd/{directory}/{name}")
        finally:
            os.close(directory)
    except BaseException:
        connection.close()
        raise
    return connection


def _open(folder: Path | str) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
