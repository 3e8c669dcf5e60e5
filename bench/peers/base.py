"""What the benchmarks ask of a peer, and the tools that its wrappers share.

All methods block. They are called from one thread with a mount namespace of its own (`bench.stage`), so that a peer's
mounts end with that thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SECONDS = 120.0
_KILL_SECONDS = 10.0
CGROUP = "hutch-bench"
"""The parent group that peers are told to use, so that their leftovers can be found."""


class PeerError(Exception):
    """A peer is missing or failed."""


class Peer(Protocol):
    """A container tool. ``image`` is the reference of a busybox image on the loopback registry."""

    name: str

    def start(self) -> None:
        """Start what the tool needs, fetch the image, and have one container running. Raises `PeerError`."""

    def stop(self) -> None:
        """Take all of it away. Idempotent; never raises."""

    def exec_argv(self, *command: str) -> list[str]:
        """The command line that executes something in the running container."""

    def one_shot(self) -> float:
        """Make a container, run ``true`` in it, remove it; returns the seconds. (Those of the removal are included
        where the tool removes by itself.)"""

    def idle(self) -> int:
        """Start one more idle container and remove it; returns the proportional set size of its processes and of its
        supervisor, in bytes."""


class Puller(Protocol):
    """A peer that can fetch images."""

    name: str

    def pull(self, reference: str) -> float:
        """Fetch and unpack an image that is not there, and leave it; returns the seconds."""


class Copier(Protocol):
    """A peer that copies files in and out of its running container."""

    name: str

    def put(self, path: Path) -> float:
        """Copy a host file into the container; returns the seconds."""

    def get(self, path: Path) -> float:
        """Copy the same file back to ``path``; returns the seconds."""


def call(argv: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a program to its end and return its output. Raises `PeerError` with its last words."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            cwd=cwd,
            env={**os.environ, **env} if env else None,
        )
    except FileNotFoundError:
        raise PeerError(f"{argv[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise PeerError(f"{' '.join(argv[:3])} did not end within {_SECONDS:g} s") from None
    if done.returncode != 0:
        words = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise PeerError(f"{' '.join(argv[:3])} … ended with {done.returncode}: {words[-300:]}")
    return done.stdout.decode(errors="replace")


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until a condition holds. Raises `PeerError`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise PeerError(f"{what} within {seconds:g} s")
        time.sleep(0.05)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Ask a child to end, kill it if it does not, and reap it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_KILL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_strays(marker: Path) -> None:
    """Kill the processes that carry a path of ours on their command line: supervisors that a tool left behind."""
    needle = os.fsencode(marker)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            if needle in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue


def remove_cgroups(name: str = CGROUP) -> None:
    """Delete a control group and its (empty) children in every hierarchy."""
    root = Path("/sys/fs/cgroup")
    for top in (root / name, *(hierarchy / name for hierarchy in root.iterdir() if hierarchy.is_dir())):
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()


def pss(pid: int) -> int:
    """The proportional set size of a process, in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise PeerError(f"process {pid} has no memory")


def pss_of_made_code(pid: int) -> int:
    """The part of `pss` that is code which the process has made itself: writable, executable, of no file."""
    total, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            counts = rest[0].startswith("rwx") and len(rest) == 4
        elif counts and first == "Pss:":
            total += int(rest[0]) * 1024
    return total


def supervised_pss(pid: int, supervisors: Sequence[str]) -> int:
    """The proportional set size of a process and of its parent, if that is a supervisor of this container alone."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    comm = Path(f"/proc/{parent}/comm").read_text().strip()
    return pss(pid) + (pss(parent) if any(comm.startswith(name) for name in supervisors) else 0)
