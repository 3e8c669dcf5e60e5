"""How fast a command's output reaches its reader."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers.base import PeerError
from bench.rows import Goal, Quantity, Row, compare
from bench.samples import alternate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.samples import Subject
    from bench.stage import Stage
    from hutch.sdk.base import Box

_BLOCK = 1 << 16
_BUFFER = 1 << 20


class Counter:
    """A writer that does nothing but count: the bytes are handed to Python code, one object a batch."""

    def __init__(self) -> None:
        self.total = 0

    def write(self, data: bytes) -> None:
        """Count."""
        self.total += len(data)


async def rate_to_writer(box: Box, command: Sequence[str], size: int) -> float:
    """Run a command that writes so many bytes, count them in a writer, and return the bytes per second."""
    sink = Counter()
    began = time.perf_counter()
    execution = await box.exec(*command, stdout=sink)
    await execution.wait()
    rate = size / (time.perf_counter() - began)
    if sink.total != size:
        raise RuntimeError(f"{sink.total} bytes of {size} arrived")
    return rate


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of output throughput, in MB/s of 10⁶ bytes."""
    size = stage.plan.stream_mib << 20
    command = ("dd", "if=/dev/zero", f"bs={_BLOCK}", f"count={size // _BLOCK}")
    box = await stage.runtime.create(stage.image)
    await box.run("true")

    async def to_file() -> float:
        with Path("/dev/null").open("wb", buffering=0) as sink:
            began = time.perf_counter()
            execution = await box.exec(*command, stdout=sink)
            await execution.wait()
            return size / (time.perf_counter() - began)

    async def to_writer() -> float:
        return await rate_to_writer(box, command, size)

    def piped(argv: Sequence[str]) -> Subject:
        return stage.measured(lambda: _read(argv, size))

    subjects: dict[str, Subject] = {
        "file": to_file,
        "writer": to_writer,
        "subprocess pipe": piped(("busybox", *command)),
    }
    for name, peer in stage.peers.items():
        subjects[f"{name} exec"] = piped(peer.exec_argv(*command))
    outcomes = await alternate(subjects, dict.fromkeys(subjects, stage.plan.repeats), budget=stage.plan.budget * 2)
    await box.remove(force=True)
    peers = outcomes | {f"{name} exec": outcome for name, outcome in stage.missing().items()}
    to_file_, to_writer_ = peers.pop("file"), peers.pop("writer")
    goal: dict[str | None, Goal] = {None: Goal("at least 1500 MB/s", "value", at_least=1500)}
    size_text = f"{stage.plan.stream_mib} MiB of output"
    return compare(
        Quantity("throughput", f"{size_text} to a file", "MB/s", 1e-6, more_is_better=True), to_file_, peers, goal
    ) + compare(
        Quantity("throughput", f"{size_text} to a Python writer", "MB/s", 1e-6, more_is_better=True),
        to_writer_,
        {"subprocess pipe": peers["subprocess pipe"]},
    )


def _read(argv: Sequence[str], size: int) -> float:
    buffer = memoryview(bytearray(_BUFFER))
    began = time.perf_counter()
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdout is not None
        total = 0
        while count := process.stdout.readinto(buffer):  # type: ignore[attr-defined]  # a raw stream, as bufsize is 0
            total += count
        code = process.wait()
    if total != size or code != 0:
        raise PeerError(f"{total} bytes of {size} arrived, exit code {code}")
    return size / (time.perf_counter() - began)
