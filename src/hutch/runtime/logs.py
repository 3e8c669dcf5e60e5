"""The main command's log: two files that the agent fills in turn (docs/agent-protocol.md). What they hold is not
trusted."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from hutch.core import agentproto as proto
from hutch.types import LogEntry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_RECORD = struct.Struct("<QQIBxxx")
_MAX_RECORD = 1 << 20
NAMES = {proto.STDOUT: "stdout", proto.STDERR: "stderr"}


class Record(NamedTuple):
    """One record: when, where in its stream, and what."""

    time: float
    position: int
    stream: int
    data: bytes

    def entry(self) -> LogEntry:
        """The record as the caller sees it."""
        return LogEntry(time=self.time, stream=NAMES[self.stream], data=self.data)


def read(directory: Path) -> list[Record]:
    """Return what the log of a box holds, oldest first; a record that is still being written is left out."""
    parts = [list(_records(directory / f"main.log.{number}")) for number in (0, 1)]
    parts.sort(key=lambda records: records[0].time if records else 0.0)
    return [record for records in parts for record in records]


def tail(records: list[Record], lines: int) -> list[Record]:
    """Return the end of the log: its last ``lines`` lines, of both streams together."""
    kept: list[Record] = []
    wanted = lines
    for index, record in enumerate(reversed(records)):
        data = record.data
        complete = index == 0 and data.endswith(b"\n")
        end = len(data) - 1 if complete else len(data)
        while wanted > 0 and (end := data.rfind(b"\n", 0, end)) >= 0:
            wanted -= 1
        if wanted <= 0:
            cut = end + 1
            if cut < len(data):
                kept.append(Record(record.time, record.position + cut, record.stream, data[cut:]))
            break
        kept.append(record)
    return kept[::-1] if lines > 0 else []


def ends(records: list[Record]) -> dict[int, int]:
    """Return the position after the last byte of each stream."""
    last = dict.fromkeys(NAMES, 0)
    for record in records:
        last[record.stream] = max(last[record.stream], record.position + len(record.data))
    return last


def beyond(records: list[Record], positions: dict[int, int]) -> list[Record]:
    """Return what lies behind the given positions."""
    later = []
    for record in records:
        skip = max(0, positions[record.stream] - record.position)
        if skip < len(record.data):
            later.append(Record(record.time, record.position + skip, record.stream, record.data[skip:]))
    return later


def exit_record(directory: Path) -> tuple[int, bool, float] | None:
    """Return (status, timed out, time) of the main command's end, ``None`` when it has not ended."""
    try:
        words = (directory / "exit").read_bytes()[:256].split()
        keyword, status, timed_out, time = words[:4]
        if keyword != b"exit":
            return None
        return int(status), timed_out == b"1", int(time) / 1e9
    except (OSError, ValueError):
        return None


def _records(path: Path) -> Iterator[Record]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    position = 0
    while position + _RECORD.size <= len(data):
        time, start, length, stream = _RECORD.unpack_from(data, position)
        position += _RECORD.size
        if length > _MAX_RECORD or stream not in NAMES or position + length > len(data):
            return
        yield Record(time / 1e9, start, stream, data[position : position + length])
        position += length
