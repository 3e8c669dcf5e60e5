"""What a box's ``run`` folder says about its processes: the one place from which any process can take a box away."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import anyio
import msgspec

from hutch.errors import UpstreamUnavailableError
from hutch.host import files, unixsocket
from hutch.host.cgroup import Group
from hutch.host.proc import Process

if TYPE_CHECKING:
    import socket
    from pathlib import Path

STATE = "state.json"
SOCKET = "agent.sock"
CONNECT_SECONDS = 5.0


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Written before the control groups are made (without ``process``), and again before the box may run."""

    group: Group
    process: Process | None = None


def _run(directory: Path, name: str = "") -> str:
    return f"{directory}/run/{name}"


def write(directory: Path, record: Record) -> None:
    """Store the record atomically. Raises `StorageError`."""
    files.atomic_write(_run(directory, STATE), msgspec.json.encode(record))


def read(directory: Path) -> Record | None:
    """Return the record; ``None`` when there is none, or none that can be understood."""
    try:
        with open(_run(directory, STATE), "rb", buffering=0) as file:
            data = file.read()
        return msgspec.json.decode(data, type=Record)
    except (OSError, msgspec.DecodeError):
        return None


def clear(directory: Path) -> None:
    """Remove the run files; the folder stays. Idempotent."""
    with contextlib.suppress(FileNotFoundError), os.scandir(_run(directory)) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)


def listen(directory: Path, name: str = SOCKET) -> socket.socket:
    """Return a listening socket in the ``run`` folder."""
    return unixsocket.listen(_run(directory), name)


def connect(directory: Path, name: str = SOCKET) -> socket.socket:
    """Return a connected non-blocking socket to what listens in the ``run`` folder: the box's agent.

    Raises `UpstreamUnavailableError` when nobody listens, `BlockingIOError` when its queue of connections is full.
    """
    try:
        return unixsocket.connect(_run(directory), name)
    except BlockingIOError:
        raise
    except OSError as error:
        raise UpstreamUnavailableError(
            f"the agent of the box in {directory} does not listen ({name}: {error.strerror})"
        ) from error


async def connect_patiently(directory: Path) -> socket.socket:
    """`connect`, waiting a while for room in the agent's queue. Raises `UpstreamUnavailableError`."""
    with anyio.move_on_after(CONNECT_SECONDS):
        while True:
            try:
                return connect(directory)
            except BlockingIOError:
                await anyio.sleep(0.002)  # a full queue gives no event to wait for
    raise UpstreamUnavailableError(f"the agent of the box in {directory} does not accept connections")


def alive(directory: Path) -> Record | None:
    """Return the record of a box that runs, ``None`` of one that does not."""
    entry = read(directory)
    return entry if entry is not None and entry.process is not None and entry.process.runs() else None
