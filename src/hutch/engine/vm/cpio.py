"""An initramfs as the kernel reads it: cpio's "newc" form (the kernel's driver-api/early-userspace/buffer-format)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def archive(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """Return an archive of files and folders: name → (mode with its type, contents). The same input gives the same
    bytes."""
    parts = [
        _entry(name, mode, contents, number) for number, (name, (mode, contents)) in enumerate(files.items(), start=1)
    ]
    return b"".join(parts) + _entry("TRAILER!!!", 0, b"", 0)


def _entry(name: str, mode: int, contents: bytes, number: int) -> bytes:
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(contents), 0, 0, 0, 0, len(path), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + path) + _padded(contents)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
