"""Empty qcow2 images, and what a header may say (QEMU's docs/interop/qcow2.txt).

An image of ours names no other file: what lies below it is said at each start, so files can be moved, and one that a
box has forged cannot make a program of the host read something else.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from hutch.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC = 0x514649FB
_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_HEADER = struct.Struct(">IIQIIQIIQQIIQQQQII")
_COPIED = 1 << 63
_KNOWN_INCOMPATIBLE = 0b11
"""Dirty, corrupt: they say how the image fares. The other bits change what it is."""


def create(path: Path, size: int) -> None:
    """Make an image of ``size`` bytes in which nothing is written. Raises `StorageError`."""
    entries = -(-size // (_CLUSTER * _CLUSTER // 8))
    table = -(-entries * 8 // _CLUSTER)
    # Clusters: header, refcount table, refcount block, level 1 table.
    header = _HEADER.pack(
        *(_MAGIC, 3, 0, 0, _CLUSTER_BITS, size, 0, entries, 3 * _CLUSTER, _CLUSTER, 1, 0, 0),
        *(0, 0, 0, 4, _HEADER.size + 8),
    )
    header += bytes(8)  # compression type and padding, then no extensions
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.pwrite(fd, header + bytes(8), 0)
            os.pwrite(fd, struct.pack(">Q", 2 * _CLUSTER), _CLUSTER)
            os.pwrite(fd, struct.pack(f">{3 + table}H", *[1] * (3 + table)), 2 * _CLUSTER)
            os.ftruncate(fd, (3 + table) * _CLUSTER)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(f"cannot make the disk {path}: {error.strerror}") from error


def virtual_size(path: Path) -> int:
    """Return the size of an image, in bytes. Raises `StorageError` for what is not one of ours."""
    try:
        with path.open("rb") as file:
            data = file.read(_HEADER.size)
        fields = _HEADER.unpack(data)
    except (OSError, struct.error) as error:
        raise StorageError(f"the disk {path} cannot be read: {error}") from error
    magic, version, backing, _, _, size, encryption = fields[:7]
    if magic != _MAGIC or version != 3:
        raise StorageError(f"the disk {path} is damaged: it is no qcow2 image; restore a snapshot")
    if backing or encryption or fields[13] & ~_KNOWN_INCOMPATIBLE:
        raise StorageError(f"the disk {path} was tampered with: it names other files; restore a snapshot")
    return int(size)
