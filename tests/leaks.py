"""Where a value that must be nowhere has been left."""

from __future__ import annotations

import contextlib
from pathlib import Path


def searched(root: Path) -> list[Path]:
    """The files below a folder, but for images."""
    return [path for path in root.rglob("*") if path.is_file() and "images" not in path.relative_to(root).parts]


def holders(value: str, *roots: Path, processes: tuple[int, ...] = ()) -> list[Path]:
    """The files below the folders, and of what the kernel tells of processes, that hold the value. What is removed
    meanwhile holds nothing."""
    paths = [path for root in roots for path in searched(root)]
    paths += [Path(f"/proc/{pid}/{name}") for pid in processes for name in ("environ", "cmdline")]
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if value.encode() in path.read_bytes():
                found.append(path)
    return found
