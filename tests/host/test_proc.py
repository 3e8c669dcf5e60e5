"""Processes are told apart by more than their number."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from pathlib import Path

import anyio
import msgspec
import pytest

from hutch.host import cgroup, proc
from hutch.types import Limits


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


@pytest.mark.root
def test_a_process_that_ends_is_alive_but_does_not_run() -> None:
    """The first process of a namespace ends when all others have, and a frozen one does not."""
    group = cgroup.Group.named(f"test-proc-{os.getpid()}")
    freezers = [member for member in group.members if member.version == 1 and "freezer" in member.controllers]
    if not freezers:
        pytest.skip("processes that are frozen by version 2 control groups can be killed")

    async def main() -> None:
        command = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", "sleep 60 & echo; wait"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            first = int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text())
            sleeper = int(Path(f"/proc/{first}/task/{first}/children").read_text())
            process = proc.Process.of(first)
            assert process is not None and process.runs()
            try:
                assert group.create(Limits(pids=None)) == ()
                Path(freezers[0].file("cgroup.procs")).write_text(str(sleeper))
                await group.freeze(True)
                os.kill(first, signal.SIGKILL)
                assert await proc.poll_until(lambda: not process.runs(), 5.0)
                assert process.alive()
                await group.freeze(False)
                assert await process.kill(5.0)
                assert not process.alive() and not process.runs()
            finally:
                await group.remove()

    anyio.run(main)


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
