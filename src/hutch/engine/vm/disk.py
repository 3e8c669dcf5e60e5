"""The disks of VMs.

bases/<key>.ext4       an image as one file system of the boxes' size, shared by them all, never written again
<box>/base.ext4        the same file by another name (a hard link): so the store may forget a base while boxes need it
<box>/disk.qcow2       what the box has written on top of it
<frozen layer>/...     the same two, moved away from a box: qcow2 images stack up

Each start says anew what lies below what, so nothing in a file refers to another.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hutch.engine import trees
from hutch.engine.base import Upper
from hutch.engine.vm import qcow2
from hutch.errors import EngineError, StorageError, UnsupportedError
from hutch.host import command, files, mapping
from hutch.host.binary import agent_path

if TYPE_CHECKING:
    from hutch.engine.base import BoxPlan, Lower

BASE, DISK = "base.ext4", "disk.qcow2"
GB = 1 << 30
DEFAULT_GB = 10
MAX_CHAIN = 100
KEPT = 16
_MKFS = "mkfs.ext4"
_LOCK_SECONDS = 600.0
_OPTIONS = (
    *("-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0", "-J", "size=16"),
    *("-e", "remount-ro", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"),
)


class Chain(msgspec.Struct, frozen=True):
    """The files of a disk: ``base``, then frozen qcow2 images, bottom first; the box's own one is writable."""

    base: Path
    frozen: tuple[Path, ...]
    own: Path

    def open(self) -> list[int]:
        """Open all of them, in this order; only the last one for writing. The caller closes them."""
        opened: list[int] = []
        try:
            for path in (self.base, *self.frozen, self.own):
                access = os.O_RDWR if path is self.own else os.O_RDONLY
                opened.append(os.open(path, access | os.O_CLOEXEC | os.O_NOFOLLOW))
        except OSError as error:
            close(opened)
            raise StorageError(f"cannot open the disk {error.filename}: {error.strerror}") from error
        return opened


def close(descriptors: list[int]) -> None:
    """Close what `Chain.open` has opened."""
    for fd in descriptors:
        os.close(fd)


async def prepare(plan: BoxPlan, store: Path) -> Chain:
    """Make what the box's disk lacks. Raises `StorageError`, `EngineError`."""
    frozen = [lower.path for lower in plan.lowers if lower.owned_by_box]
    images = [lower for lower in plan.lowers if not lower.owned_by_box]
    if len(frozen) > MAX_CHAIN:
        raise UnsupportedError(
            f"box {plan.box_id} has {len(frozen)} snapshots and clones behind it, the most is {MAX_CHAIN}"
        )
    source = frozen[-1] if frozen else plan.directory
    if not (source / BASE).exists():
        if frozen:
            raise StorageError(f"the disk below {source} is missing; remove the box")
        wanted = (plan.limits.disk_gb or DEFAULT_GB) * GB
        await _adopt(await _base(images, wanted, store), plan.directory / BASE)
    own = plan.directory / DISK
    if frozen and own.exists() and own.samefile(frozen[0] / DISK):
        own.unlink()  # it was moved away, and whoever did that died before the last step
    if plan.saved:
        own.unlink(missing_ok=True)  # of a start from there that was not committed: the memory knows nothing of it
    size = (source / BASE).stat().st_size
    if not own.exists():
        partial = plan.directory / f".{DISK}"
        partial.unlink(missing_ok=True)
        qcow2.create(partial, size)
        partial.rename(own)
    chain = Chain(source / BASE, tuple(path / DISK for path in reversed(frozen)), own)
    for path in (*chain.frozen, own):
        if qcow2.virtual_size(path) != size:
            raise StorageError(f"the disk {path} was tampered with: it has another size; restore a snapshot")
    return chain


def kind(directory: Path) -> Upper:
    """See `hutch.engine.base.Engine.upper`."""
    return Upper.MOVABLE if (directory / DISK).exists() else Upper.EMPTY


def move(directory: Path, target: Path) -> None:
    """See `hutch.engine.base.Engine.move_upper`. Raises `StorageError`."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        if target.exists() and not (target / DISK).samefile(directory / DISK):
            raise StorageError(f"cannot move the disk of {directory} to {target}: it exists")
        if not target.exists():
            _begin(directory, partial)
            os.link(directory / DISK, partial / DISK)
            partial.rename(target)
        (directory / DISK).unlink()
    except OSError as error:
        files.remove_tree(partial)
        raise StorageError(f"cannot move the disk of {directory} to {target}: {error.strerror}") from error


async def copy(directory: Path, target: Path) -> None:
    """See `hutch.engine.base.Engine.copy_upper`. Raises `StorageError`."""
    if target.exists():
        raise StorageError(f"cannot copy to {target}: it exists")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        _begin(directory, partial)
        source, copied = directory / DISK, partial / DISK
        await trees.copy_by([*trees.copier(os.getpid()), str(source), str(copied)], source, copied)
        partial.rename(target)
    except OSError as error:
        raise StorageError(f"cannot copy the disk of {directory} to {target}: {error.strerror}") from error
    finally:
        files.remove_tree(partial)


def _begin(directory: Path, partial: Path) -> None:
    """Make the folder of a frozen layer that is not complete yet. The bottom one has the base."""
    partial.mkdir(mode=0o755)
    if (directory / BASE).exists():
        os.link(directory / BASE, partial / BASE)


def reset(directory: Path) -> None:
    """See `hutch.engine.base.Engine.reset_upper`. Raises `StorageError`."""
    for name in (DISK, BASE):
        files.remove_tree(directory / name)


def size(directory: Path) -> int:
    """See `hutch.engine.base.Engine.upper_size`."""
    try:
        return (directory / DISK).stat().st_blocks * 512
    except FileNotFoundError:
        return 0


async def _adopt(base: Path, target: Path) -> None:
    try:
        os.link(base, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM):
            raise StorageError(f"cannot use the base {base}: {error.strerror}") from error
        partial = target.with_name(f".{target.name}")
        partial.unlink(missing_ok=True)
        await trees.copy_tree(base, partial)
        partial.rename(target)


async def _base(layers: list[Lower], size: int, store: Path) -> Path:
    """Return the file system with the contents of these layers; make it if it is missing."""
    folder = store / "bases"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest = hashlib.sha256(b"%d" % size)
    for lower in layers:
        status = lower.path.stat()
        digest.update(f"{lower.path.resolve()}\0{status.st_dev} {status.st_ino} {status.st_mtime_ns}\0".encode())
    path = folder / f"{digest.hexdigest()[:32]}.ext4"
    if not path.exists():
        async with files.locked(folder / f".{path.name}.lock", timeout=_LOCK_SECONDS):
            if not path.exists():
                await _make_base([str(lower.path) for lower in layers], size, path)
                _drop_old(folder)
    with contextlib.suppress(OSError):
        os.utime(path)
    return path


def _drop_old(folder: Path) -> None:
    """Forget the bases that no box has and that were made the longest time ago."""
    unused = [path for path in files.newest_first(folder.glob("*.ext4")) if _links(path) == 1]
    for path in unused[KEPT:]:
        path.unlink(missing_ok=True)


def _links(path: Path) -> int:
    try:
        return path.stat().st_nlink
    except FileNotFoundError:
        return 0


async def _make_base(layers: list[str], size: int, path: Path) -> None:
    program = shutil.which(_MKFS, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if program is None:
        raise EngineError(f"{_MKFS} is missing; install the Debian package e2fsprogs")
    try:
        async with files.scratch(path.parent, path.stem) as scratch:
            partial, point = scratch / path.name, scratch / "point"
            point.mkdir()
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size)
            finally:
                os.close(fd)
            ids = mapping.current()
            tree = layers[0] if len(layers) == 1 else str(point / "root")
            argv = [program, *_OPTIONS, "-d", tree, str(partial)]
            if len(layers) > 1:
                flags = ["--userxattr"] if ids.rootless else []
                argv = [str(agent_path()), "merged", *flags, str(point), *layers, "--", *argv]
            await command.run(ids.wrap(argv), f"make the disk of an image ({layers[0]} …)")
            partial.rename(path)
    except OSError as error:
        raise StorageError(f"cannot make the base {path}: {error.strerror}") from error
