"""Processes, named so that a reused pid is never mistaken for the one that was meant."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable


@functools.cache
def boot_id() -> str:
    """Return the kernel's random id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


_PF_EXITING = 0x4
"""A flag of a process that is past the point of return (include/linux/sched.h)."""


def start_time(pid: int) -> int | None:
    """Return when a live process started, in clock ticks since the boot; ``None`` when it is gone or a zombie."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def _stat(pid: int) -> list[bytes] | None:
    """Return what follows the name in a live process's ``stat`` file (proc_pid_stat(5))."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        text = os.read(fd, 4096)
    except OSError:
        return None
    finally:
        os.close(fd)
    fields = text[text.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else fields


class Process(msgspec.Struct, frozen=True):
    """The identity of a process: the pid alone is reused, all three together are not."""

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Identify a running process; ``None`` when it has ended."""
        started = start_time(pid)
        return None if started is None else cls(pid, started, boot_id())

    def alive(self) -> bool:
        """Whether it still runs (a zombie does not)."""
        return self.boot == boot_id() and start_time(self.pid) == self.started

    def runs(self) -> bool:
        """Whether it is alive and does not end just now: that may take a while in which it answers nobody."""
        fields = _stat(self.pid) if self.boot == boot_id() else None
        return fields is not None and int(fields[19]) == self.started and not int(fields[6]) & _PF_EXITING

    def pidfd(self) -> int | None:
        """Return a new descriptor that stands for exactly this process, or ``None`` when it has ended."""
        if self.boot != boot_id():
            return None
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:
            return None
        if self.alive():  # checked after the open: the descriptor cannot change its process any more
            return fd
        os.close(fd)
        return None

    async def kill(self, timeout: float) -> bool:
        """Send SIGKILL and wait (in seconds) for the end. Returns whether the process is gone."""
        fd = self.pidfd()
        if fd is None:
            return True
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            return await ended(fd, timeout)
        finally:
            os.close(fd)


def has_ended(pidfd: int) -> bool:
    """Whether the process of a pidfd has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


async def ended(pidfd: int, timeout: float) -> bool:
    """Wait up to ``timeout`` seconds for the end of the process; returns whether it came."""
    with anyio.move_on_after(timeout) as scope:
        await anyio.wait_readable(pidfd)
    return not scope.cancelled_caught


async def poll_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait for something that gives no event, asking at growing intervals (1 … 50 ms). Returns whether it came true
    in time."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while not condition():
        if time.monotonic() > deadline:
            return False
        await anyio.sleep(pause)
        pause = min(pause * 2, 0.05)
    return True
