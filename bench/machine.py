"""Facts about the machine and the versions that were compared."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec

import hutch

_VERSIONS = {
    "crun": ("crun", "--version"),
    "runc": ("runc", "--version"),
    "podman": ("podman", "--version"),
    "docker": ("dockerd", "--version"),
    "skopeo": ("skopeo", "--version"),
    "umoci": ("umoci", "--version"),
}


class Machine(msgspec.Struct, frozen=True):
    """See the module. ``memory`` in bytes; ``load`` is the one-minute load average before the run."""

    cpu: str
    cores: int
    memory: int
    kernel: str
    distribution: str
    virtual: bool
    python: str
    hutch: str
    peers: dict[str, str | None]
    date: str
    load: float


def describe() -> Machine:
    """Look."""
    return Machine(
        cpu=_field("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        distribution=_field("/etc/os-release", r'PRETTY_NAME="?([^"\n]+)') or "unknown",
        virtual=re.search(r"\bhypervisor\b", Path("/proc/cpuinfo").read_text()) is not None,
        python=sys.version.split()[0],
        hutch=hutch.__version__,
        peers={name: _version(argv) for name, argv in _VERSIONS.items()},
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        load=round(os.getloadavg()[0], 2),
    )


def _field(path: str, pattern: str) -> str | None:
    found = re.search(pattern, Path(path).read_text())
    return found[1].strip() if found else None


def _version(argv: tuple[str, ...]) -> str | None:
    program = shutil.which(argv[0]) or shutil.which(argv[0], path="/usr/sbin:/usr/local/sbin")
    if program is None:
        return None
    text = subprocess.run([program, *argv[1:]], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+\.\d+[^\s,]*", text)
    return found[0] if found else None
