"""What VMs are made from, kept between runs: a fresh home would fetch a kernel and boot a template anew."""

from __future__ import annotations

from pathlib import Path

_KEPT = Path(__file__).parent.parent / ".cache" / "vm"


def share(home: Path) -> None:
    """Let a fresh home use what the tests have made."""
    _KEPT.mkdir(parents=True, exist_ok=True)
    (home / "vm").symlink_to(_KEPT)


def share_kernels(home: Path) -> None:
    """Let a fresh home use their kernels alone: its templates and disks are its own."""
    kernels = _KEPT / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (home / "vm").mkdir()
    (home / "vm/kernels").symlink_to(kernels)
