"""Whether KVM runs guests at native speed here.

That /dev/kvm can be opened proves nothing, and neither does that a guest runs: on some nested hosts each instruction
is emulated, much slower than by QEMU's own translator. So a small guest counts (`hutch.host.kvmguest`): a
processor needs milliseconds for that.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import subprocess
import sys
import time
from pathlib import Path

from hutch.errors import StorageError
from hutch.host import files
from hutch.host.proc import boot_id

SECONDS = 0.5
_START_SECONDS = 10.0


@functools.cache
def usable() -> bool:
    """Whether VMs should use KVM. The answer is kept for as long as the machine runs; finding it takes up to half a
    second."""
    path = _answer_file()
    key = f"{boot_id()} {os.geteuid()}".encode()
    with contextlib.suppress(OSError):
        kept, _, answer = path.read_bytes().rpartition(b" ")
        if kept == key:
            return answer == b"yes"
    answer = b"yes" if probe() else b"no"
    with contextlib.suppress(StorageError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.atomic_write(path, key + b" " + answer)
    return answer == b"yes"


def refuse() -> None:
    """Do without KVM until the machine is started again: a real guest did not come up under it."""
    with contextlib.suppress(StorageError):
        files.atomic_write(_answer_file(), f"{boot_id()} {os.geteuid()} no".encode())
    usable.cache_clear()


def _answer_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hutch" / "kvm"


def probe() -> bool:
    """Run the guest, in a process of its own, which is killed when it takes too long."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    with subprocess.Popen(
        [sys.executable, "-m", "hutch.host.kvmguest"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        try:
            assert child.stdout is not None
            fd = child.stdout.fileno()
            return _read(fd, _START_SECONDS) == b"S" and _read(fd, SECONDS) == b"N"
        finally:
            child.kill()


def _read(fd: int, seconds: float) -> bytes:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0]:
            return os.read(fd, 1)
    return b""
