"""Mounts by system call: what a container engine does in-process should not be timed as the start of mount(8)."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CLONE_NEWNS = 0x00020000
_MS_REC = 0x4000
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 2
_UNIFIED = Path("/sys/fs/cgroup/unified")

_libc = ctypes.CDLL(None, use_errno=True)


def enter_private_namespace() -> None:
    """Give the calling thread a mount namespace of its own: what it and its children mount goes when they end.

    It lacks the second hierarchy of hybrid control groups, with which crun refuses to run. Raises `OSError`.
    """
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "make / private")
    if _UNIFIED.is_mount():
        _check(_libc.umount2(os.fsencode(_UNIFIED), _MNT_DETACH), f"unmount {_UNIFIED}")


def overlay(lower: Path, upper: Path, work: Path, target: Path) -> None:
    """Mount an overlay. Raises `OSError`."""
    options = os.fsencode(f"lowerdir={lower},upperdir={upper},workdir={work}")
    _check(_libc.mount(b"overlay", os.fsencode(target), b"overlay", ctypes.c_ulong(0), options), f"mount {target}")


def unmount(target: Path) -> None:
    """Unmount what is mounted at ``target``, if anything."""
    _libc.umount2(os.fsencode(target), _MNT_DETACH)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
