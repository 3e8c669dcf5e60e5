"""The store's folder: who may write what, and what a kill -9 can leave behind.

    index.json            references -> config digest; replaced atomically under the lock ``index``
    images/<hex>.json     one record an image, named by the config digest
    layers/<hex>/fs       an unpacked layer, named by its diff id; complete from the moment it has that name
    layers/<hex>/info     its size
    tmp/<name>/           work in progress; whoever gets the lock ``<name>`` may delete it
    locks/<name>          lock files (flock(2): the kernel frees them when their holders end, however they end)

A layer that is being made is locked exclusively; one that a pull counts on is locked shared until the image's record is
written. So whoever holds ``index`` and an exclusive lock on a layer that no record names may delete that layer.
The folder is private (mode 0700): layers hold setuid programs that are nobody's business on the host.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from hutch.core.ociref import parse
from hutch.errors import StorageError
from hutch.host.files import atomic_write, locked
from hutch.types import ImageInfo

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

_T = TypeVar("_T")
_log: Final = logging.getLogger(__name__)

_INDEX: Final = "index"
_INDEX_TIMEOUT: Final = 60.0
"""Seconds; it is only held for moments."""
POLL: Final = 0.05
"""Seconds between two looks at a lock that others hold (flock(2) has no way to wait that can be cancelled)."""


class LayerInfo(msgspec.Struct, frozen=True):
    """What is known of an unpacked layer. ``size`` is that of its files' contents, in bytes."""

    size: int
    entries: int


class _Index(msgspec.Struct):
    references: dict[str, str] = {}


class Lock:
    """A held lock."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Release the lock."""
        os.close(self._fd)


class Disk:
    """The folder's layout and its atomic operations. Raises `StorageError` when the folder cannot be used."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layers = root / "layers"
        self.tmp = root / "tmp"
        self._images = root / "images"
        self._locks = root / "locks"
        self._index = root / "index.json"

    def prepare(self) -> None:
        """Make the folder."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (self.layers, self.tmp, self._images, self._locks):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageError(f"the image store {self.root} cannot be made: {error}") from error

    def index_lock(self) -> AbstractAsyncContextManager[None]:
        """Hold the lock of references and records."""
        return locked(self._locks / _INDEX, timeout=_INDEX_TIMEOUT)

    def try_lock(self, name: str, *, shared: bool = False) -> Lock | None:
        """Take a lock, ``None`` when others (in this process or another) have it."""
        path = self._locks / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"the lock {path} cannot be opened: {error}") from error
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # The holder before may have removed the file: then this is a lock on nothing.
            if os.path.samestat(os.fstat(fd), path.stat()):
                return Lock(fd)
        os.close(fd)
        return None

    # Layers

    def layer(self, diff_id: str) -> Path:
        """Return the folder of a layer, whether it exists or not."""
        return self.layers / short(diff_id)

    def layer_info(self, diff_id: str) -> LayerInfo | None:
        """Return what is known of a layer, ``None`` when it is not there."""
        return _read(self.layer(diff_id) / "info", LayerInfo)

    def finish_layer(self, work: Path, diff_id: str, info: LayerInfo) -> None:
        """Give a made layer (``work`` with ``fs`` in it) its name. The caller holds the layer's exclusive lock."""
        _write(work / "info", info)
        target = self.layer(diff_id)
        if target.exists():  # without a readable ``info``: damaged
            target.rename(self.tmp / secrets.token_hex(8))
        work.rename(target)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Make a work folder with an empty ``fs`` in it, ours until the end. What is left then, `sweep` deletes."""
        name = secrets.token_hex(8)
        lock = self.try_lock(name)
        assert lock is not None  # nobody else has this name
        with closing(lock):
            path = self.tmp / name
            path.mkdir(mode=0o700)
            (path / "fs").mkdir()
            (path / "fs").chmod(0o755)
            yield path
            # Whoever opened the lock's file in between will see that it is gone: see `try_lock`.
            (self._locks / name).unlink(missing_ok=True)

    def detach_layers(self, keep: Container[str]) -> int:
        """Move the layers (by name) that are not kept, nor counted on by a pull, to ``tmp``; return their size.

        The caller holds ``index``.
        """
        freed = 0
        for path in self.layers.iterdir():
            lock = self.try_lock(path.name) if path.name not in keep else None
            if lock is not None:
                with closing(lock):
                    info = _read(path / "info", LayerInfo)
                    freed += info.size if info else 0
                    path.rename(self.tmp / f"gone-{secrets.token_hex(8)}")
        return freed

    async def sweep(self, remove: Callable[[Path], Awaitable[None]]) -> None:
        """Delete the work folders that nobody works in, and the lock files that protect nothing."""
        for path in self.tmp.iterdir():
            if (lock := self.try_lock(path.name)) is not None:
                with closing(lock):
                    try:
                        await remove(path)
                    except StorageError as error:  # a dead process's child may still be writing: the next time, then
                        _log.warning("%s", error)
        for path in self._locks.iterdir():
            if path.name != _INDEX and (lock := self.try_lock(path.name)) is not None:
                with closing(lock):
                    if not (self.layers / path.name).exists() and not (self.tmp / path.name).exists():
                        path.unlink(missing_ok=True)

    # Records and references

    def read_record(self, digest: str) -> ImageInfo | None:
        """Return the record of an image (without references)."""
        return _read(self._record(digest), ImageInfo)

    def write_record(self, info: ImageInfo) -> None:
        """Store a record. The caller holds ``index``."""
        _write(self._record(info.digest), info)

    def delete_record(self, digest: str) -> None:
        """Delete a record. The caller holds ``index``."""
        self._record(digest).unlink(missing_ok=True)

    def drop_leftovers(self) -> None:
        """Delete files that were being written when their writer died. The caller holds ``index``."""
        for folder in (self.root, self._images):
            for path in folder.glob(".*"):
                path.unlink(missing_ok=True)

    def records(self) -> list[ImageInfo]:
        """Return all records (without references)."""
        found = (_read(path, ImageInfo) for path in self._images.glob("*.json"))
        return [info for info in found if info is not None]

    def references(self) -> dict[str, str]:
        """Return all references and the config digests that they name."""
        index = _read(self._index, _Index)
        return index.references if index else {}

    def with_names(self, info: ImageInfo) -> ImageInfo:
        """Return the record with the references that the image has now, in their short form."""
        names = sorted(name for name, digest in self.references().items() if digest == info.digest)
        return msgspec.structs.replace(info, references=tuple(parse(name).familiar for name in names))

    def write_references(self, references: dict[str, str]) -> None:
        """Replace the references. The caller holds ``index``."""
        _write(self._index, _Index(references))

    def _record(self, digest: str) -> Path:
        return self._images / f"{short(digest)}.json"


def short(digest: str) -> str:
    """Return a digest without its algorithm: the name of files."""
    return digest.partition(":")[2]


def _read(path: Path, kind: type[_T]) -> _T | None:
    """Read a small file. A damaged one counts as absent: what it described is fetched again."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        _log.warning("%s is damaged and ignored: %s", path, error)
        return None


def _write(path: Path, value: msgspec.Struct) -> None:
    # Not synchronised with the disk: on ext4 that would write out the whole layer first, for seconds.
    atomic_write(path, msgspec.json.encode(value))
