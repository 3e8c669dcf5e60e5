"""Disks of a fixed size: ext4 file systems in sparse files, mounted by way of loop devices (loop(4)) by the agent
program (agent/launch_disk.c)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
from pathlib import Path

from hutch.errors import StorageError
from hutch.host import command

# linux/loop.h
_GET_FREE = 0x4C82
_GET_STATUS = 0x4C05
_STATUS_SIZE = 232
_MKFS = "mkfs.ext4"
# A journal, because a box's files survive a power cut; small, because the box pays for it. Reserved blocks and room
# to grow are of no use here. One inode for 8 KiB: boxes hold many small files.
_OPTIONS = (
    *("-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "8192", "-m", "0", "-J", "size=16"),
    *("-O", "^resize_inode", "-e", "remount-ro", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"),
)


def problem() -> str:
    """Return why such disks cannot be used here; empty when they can."""
    if os.geteuid() != 0:
        return "mounting them needs root"
    if _find(_MKFS) is None:
        return f"{_MKFS} is not installed"
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            number = fcntl.ioctl(control, _GET_FREE)
        finally:
            os.close(control)
        os.close(os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return f"no loop devices: {error.filename or '/dev/loop-control'}: {error.strerror}"
    return ""


async def make(image: Path, size: int, contents: Path) -> None:
    """Make a file with a file system of ``size`` bytes that holds a copy of a folder; it takes room on the host as it
    is written. A file that is not complete has another name in the same folder.

    Raises `StorageError`.
    """
    program = _find(_MKFS)
    if program is None:
        raise StorageError(f"cannot make {image}: {_MKFS} is not installed (apt-get install e2fsprogs)")
    partial = image.with_name(f".{image.name}")
    try:
        # A file of its own: a process that was killed here may have left one that its mkfs still writes.
        partial.unlink(missing_ok=True)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)
        await command.run([program, *_OPTIONS, "-d", str(contents), str(partial)], f"make the disk {image}")
        partial.rename(image)
    except OSError as error:
        raise StorageError(f"cannot make the disk {image}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


async def repair(image: Path) -> None:
    """Check a file system in which the kernel has met errors, e.g. because the host's disk was full. Its file must
    not be attached. Nothing happens to a sound one.

    Raises `StorageError` when it cannot be repaired without loss.
    """
    if not _marked(image):
        return
    program = _find("e2fsck")
    if program is None:
        raise StorageError(f"cannot repair {image}: e2fsck is not installed (apt-get install e2fsprogs)")
    try:
        await command.run([program, "-f", "-p", str(image)], f"repair the disk {image}", accepted=(0, 1))
    except StorageError as error:
        raise StorageError(f"{error}; repair it with `e2fsck {image}`, or restore a snapshot") from error


def _marked(image: Path) -> bool:
    """Whether the superblock says so: s_state of struct ext4_super_block (ext4's on-disk format in the kernel's
    documentation)."""
    with image.open("rb") as file:
        file.seek(1024 + 0x3A)
        state = file.read(2)
    return len(state) == 2 and bool(int.from_bytes(state, "little") & 2)


def attached(image: Path) -> bool:
    """Whether a loop device has the file: its file system is mounted, or just being taken away."""
    try:
        status = image.stat()
    except OSError:
        return False
    return any(_backing(entry.name) == (status.st_dev, status.st_ino) for entry in Path("/sys/block").glob("loop*"))


def _backing(device: str) -> tuple[int, int] | None:
    """Return (device, inode) of a loop device's file, ``None`` when it has none."""
    with contextlib.suppress(OSError):
        fd = os.open(f"/dev/{device}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            found: tuple[int, int] = struct.unpack_from("=QQ", fcntl.ioctl(fd, _GET_STATUS, bytes(_STATUS_SIZE)))
            return found
        finally:
            os.close(fd)
    return None


def _find(program: str) -> str | None:
    # An administrator's program is often not on the path.
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
