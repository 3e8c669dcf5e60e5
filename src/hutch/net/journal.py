"""What a box was refused: a bounded log in two files that take turns, one JSON line an entry."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

import msgspec

from hutch.types import Refusal

if TYPE_CHECKING:
    from pathlib import Path

NAME = "net.log"
_FILE_BYTES = 256 * 1024
_PER_SECOND = 50
_TEXT = 300


class Journal:
    """Writes the log of one box. A box that is refused more often than 50 times a second is not logged each time."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._second = 0
        self._written = 0

    def refuse(self, protocol: str, peer: str, reason: str, name: str = "") -> None:
        """Add an entry. A log that cannot be written stops nobody."""
        now = time.time()
        if int(now) != self._second:
            self._second, self._written = int(now), 0
        self._written += 1
        if self._written > _PER_SECOND:
            return
        if self._written == _PER_SECOND:
            reason += "; further ones of this second are left out"
        entry = Refusal(time=now, protocol=protocol, peer=peer[:_TEXT], name=name[:_TEXT], reason=reason[:_TEXT])
        with contextlib.suppress(OSError):
            self._append(msgspec.json.encode(entry) + b"\n")

    def _append(self, line: bytes) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(fd, line)
            full = os.fstat(fd).st_size >= _FILE_BYTES
        finally:
            os.close(fd)
        if full:
            self._path.replace(self._path.with_name(f"{NAME}.old"))


def read(directory: Path) -> list[Refusal]:
    """Return what the log holds, oldest first."""
    entries = []
    for name in (f"{NAME}.old", NAME):
        with contextlib.suppress(FileNotFoundError):
            for line in (directory / name).read_bytes().splitlines():
                with contextlib.suppress(msgspec.DecodeError):  # the last line of a full disk
                    entries.append(msgspec.json.decode(line, type=Refusal))
    return entries
