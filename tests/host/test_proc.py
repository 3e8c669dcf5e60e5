"""Processes are told apart by more than their number."""

from __future__ import annotations

import functools
import os
import subprocess
import time
from pathlib import Path

import anyio
import msgspec

from hutch.host import proc


def test_identity_of_a_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = proc.Process.of(child.pid)
        assert process is not None and process.alive()
        assert not msgspec.structs.replace(process, started=process.started + 1).alive()
        assert not msgspec.structs.replace(process, boot="another").alive()
        assert msgspec.structs.replace(process, started=1).pidfd() is None
        assert anyio.run(process.kill, 5.0)
        assert not process.alive(), "a zombie counts as dead"
        assert proc.Process.of(child.pid) is None
        assert anyio.run(process.kill, 5.0)
    assert proc.start_time(child.pid) is None


def test_names_cannot_fool_the_parser() -> None:
    """The command's name in /proc/PID/stat may hold anything, parentheses and blanks too."""
    with subprocess.Popen(
        ["sh", "-c", "printf '%s' 'Z) Z 1 2 (' > /proc/self/comm; exec 3>&1; read x"], stdin=subprocess.PIPE
    ) as child:
        deadline = time.monotonic() + 5
        while b"Z) Z" not in Path(f"/proc/{child.pid}/stat").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        assert proc.Process.of(child.pid) is not None
        child.communicate(b"\n")


def test_killing_another_process_of_the_same_number_does_nothing() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = proc.Process.of(child.pid)
        assert process is not None
        stale = msgspec.structs.replace(process, started=process.started - 1)
        assert anyio.run(stale.kill, 1.0)
        assert process.alive()
        child.kill()


def test_waiting_is_bounded() -> None:
    async def main() -> None:
        pidfd = os.pidfd_open(os.getpid())
        begun = time.monotonic()
        assert not await proc.ended(pidfd, 0.05)
        assert not await proc.poll_until(functools.partial(bool, 0), 0.05)
        assert 0.1 <= time.monotonic() - begun < 2
        assert await proc.poll_until(functools.partial(bool, 1), 0.0)
        os.close(pidfd)

    anyio.run(main)
