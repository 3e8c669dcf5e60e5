"""Write a tar stream that is not trusted below one directory of the host.

Every step goes through directory descriptors without following symlinks (openat(2), O_NOFOLLOW), so neither a name
in the stream nor a symlink that it made, nor one that someone puts there meanwhile, leads a write anywhere else.
Owners are the caller's; set-id bits, devices and special files are left out; hard links become links to what the
same stream wrote.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from typing import TYPE_CHECKING

from hutch.errors import InvalidArgumentError

if TYPE_CHECKING:
    import tarfile
    from collections.abc import Iterator
    from pathlib import Path

_PIECE = 1 << 20
_BLOCK = 4096
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_DEPTH = 1024


def extract_below(stream: tarfile.TarFile, directory: Path, name: str) -> None:
    """Extract a stream whose first member is renamed to ``name``, an entry of ``directory``; the others must lie
    below the first.

    Raises `InvalidArgumentError` for names that lead elsewhere, `OSError`.
    """
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    modes: list[tuple[list[str], int, float]] = []
    try:
        first: str | None = None
        for member in stream:
            parts = _parts(member.name)
            if first is None:
                first = parts[0] if parts else "."
                if len(parts) > 1:
                    raise InvalidArgumentError(
                        f"the box sent {member.name!r} first, which is not the name of one entry"
                    )
                if not (member.isdir() or member.isreg() or member.issym()):
                    raise InvalidArgumentError(f"{first!r} is a device, a pipe or a socket, which cannot be copied")
            path = _renamed(parts, first, name)
            _extract(stream, member, root, path, first, name)
            if member.isdir():
                modes.append((path, member.mode & 0o777, member.mtime))
        for path, mode, mtime in reversed(modes):  # last: a directory without write permission must still be filled
            with _parent(root, path) as (parent, leaf), contextlib.suppress(OSError):
                fd = os.open(leaf, _DIRECTORY, dir_fd=parent)
                try:
                    os.fchmod(fd, mode)
                    os.utime(fd, (mtime, mtime))
                finally:
                    os.close(fd)
    finally:
        os.close(root)


def _extract(
    stream: tarfile.TarFile, member: tarfile.TarInfo, root: int, path: list[str], first: str, name: str
) -> None:
    with _parent(root, path) as (parent, leaf):
        if member.isdir():
            _make_directory(parent, leaf)
        elif member.issym():
            with _replacing(parent, leaf) as temporary:
                os.symlink(member.linkname, temporary, dir_fd=parent)
        elif member.islnk():
            target = _renamed(_parts(member.linkname), first, name)
            with _parent(root, target) as (other, base), _replacing(parent, leaf) as temporary:
                os.link(base, temporary, src_dir_fd=other, dst_dir_fd=parent, follow_symlinks=False)
        elif member.isreg():
            _write_file(stream, member, parent, leaf)


def _write_file(stream: tarfile.TarFile, member: tarfile.TarInfo, parent: int, leaf: str) -> None:
    content = stream.extractfile(member)
    if content is None:
        raise InvalidArgumentError(f"the box sent {member.name!r} without content")
    with _replacing(parent, leaf) as temporary:
        fd = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent
        )
        try:
            size = 0
            while piece := content.read(_PIECE):
                _write_sparse(fd, piece)
                size += len(piece)
            os.ftruncate(fd, size)
            os.fchmod(fd, member.mode & 0o777)
            os.utime(fd, (member.mtime, member.mtime))
        finally:
            os.close(fd)


def _write_sparse(fd: int, piece: bytes) -> None:
    """Write, leaving holes for blocks of zeros."""
    if not piece.strip(b"\0"):
        os.lseek(fd, len(piece), os.SEEK_CUR)
        return
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view) :]


def _make_directory(parent: int, leaf: str) -> None:
    try:
        os.mkdir(leaf, 0o700, dir_fd=parent)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(leaf, dir_fd=parent, follow_symlinks=False).st_mode):
            os.unlink(leaf, dir_fd=parent)
            os.mkdir(leaf, 0o700, dir_fd=parent)


@contextlib.contextmanager
def _replacing(parent: int, leaf: str) -> Iterator[str]:
    """Yield a temporary name; what is made there takes the place of ``leaf`` at the end."""
    temporary = f".hutch-{secrets.token_hex(8)}"
    try:
        yield temporary
        os.rename(temporary, leaf, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=parent)
        raise
    # rename(2) of two names of one inode does nothing and leaves both.
    with contextlib.suppress(OSError):
        os.unlink(temporary, dir_fd=parent)


@contextlib.contextmanager
def _parent(root: int, path: list[str]) -> Iterator[tuple[int, str]]:
    """Yield a descriptor of the directory that holds ``path``'s last component, reached without following a
    symlink."""
    fd = os.dup(root)
    try:
        for part in path[:-1]:
            try:
                below = os.open(part, _DIRECTORY, dir_fd=fd)
            except NotADirectoryError as error:
                raise InvalidArgumentError(f"the box sent entries below {part!r}, which is not a directory") from error
            os.close(fd)
            fd = below
        yield fd, path[-1]
    finally:
        os.close(fd)


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name or name.startswith("/") or len(parts) > _MAX_DEPTH:
        raise InvalidArgumentError(f"the box sent the name {name[:200]!r}, which leads out of the target")
    return parts


def _renamed(parts: list[str], first: str, name: str) -> list[str]:
    if not parts:
        return [name]
    if parts[0] == first:
        return [name, *parts[1:]]
    if first == ".":
        return [name, *parts]
    raise InvalidArgumentError(f"the box sent {'/'.join(parts)[:200]!r}, which does not lie below {first!r}")
