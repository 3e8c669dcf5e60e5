"""Images in files: OCI layouts (image-spec, image-layout.md) and ``docker save`` archives, as folders or as tars.

Nothing is extracted: members are found once and read in place. Names in an archive never become host paths.
"""

from __future__ import annotations

import os
import posixpath
import stat
import tarfile
from typing import TYPE_CHECKING, Final, Protocol

import anyio.to_thread
import msgspec

from hutch.core.manifest import (
    MAX_DOCUMENT,
    Descriptor,
    Manifest,
    parse_index,
    parse_manifest,
    select,
    sha256,
    verify,
)
from hutch.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from hutch.core.manifest import Platform

_CHUNK: Final = 1 << 20
_MAX_MEMBERS: Final = 4096
"""An archive with more members than this is no image archive: 127 layers and their documents are far fewer."""
_MAX_LINKS: Final = 8
_NAMES: Final = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


class Extent(msgspec.Struct, frozen=True):
    """A stretch of an open file."""

    fd: int
    offset: int
    size: int

    async def stream(self) -> AsyncGenerator[bytes]:
        """Yield the bytes."""
        at = 0
        while at < self.size:
            want = min(_CHUNK, self.size - at)
            chunk = await anyio.to_thread.run_sync(os.pread, self.fd, want, self.offset + at)
            if not chunk:
                raise ImageError("the file ends too early")
            at += len(chunk)
            yield chunk

    async def read(self) -> bytes:
        """Return the bytes of a document."""
        if self.size > MAX_DOCUMENT:
            raise ImageError(f"a document has {self.size} bytes; at most {MAX_DOCUMENT} are read")
        return b"".join([chunk async for chunk in self.stream()])


class Files(Protocol):
    """Named files: a folder's or an archive's."""

    def find(self, name: str) -> Extent | None:
        """Return a regular file by its relative name, ``None`` when there is none."""

    def close(self) -> None:
        """Release the descriptors."""


class FolderFiles:
    """The files of a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fds: list[int] = []

    def find(self, name: str) -> Extent | None:
        """See `Files`. Symlinks and special files do not count."""
        try:
            fd = os.open(self._path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (OSError, ValueError):  # ValueError: a NUL in the name
            return None
        self._fds.append(fd)
        status = os.fstat(fd)
        return Extent(fd, 0, status.st_size) if stat.S_ISREG(status.st_mode) else None

    def close(self) -> None:
        """See `Files`."""
        while self._fds:
            os.close(self._fds.pop())


class TarFiles:
    """The members of a plain tar. Making one reads all headers: do it in a thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._members: dict[str, Extent] = {}
        self._links: dict[str, str] = {}
        with open(fd, "rb", closefd=False) as file:
            file.seek(0)
            try:
                with tarfile.open(fileobj=_Frugal(file), mode="r:") as archive:  # type: ignore[call-overload]
                    for count, member in enumerate(archive):
                        if count >= _MAX_MEMBERS:
                            break
                        self._add(member)
            except (tarfile.TarError, ValueError, OSError) as error:
                if not self._members and not self._links:
                    raise ImageError(f"this is not an archive: {error}") from error

    def _add(self, member: tarfile.TarInfo) -> None:
        name = posixpath.normpath(member.name)
        if member.isreg() and not member.issparse():
            self._members[name] = Extent(self._fd, member.offset_data, member.size)
        elif member.issym():
            self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        elif member.islnk():
            self._links[name] = posixpath.normpath(member.linkname)

    def find(self, name: str) -> Extent | None:
        """See `Files`. Links count: ``docker save`` makes them for layers that images share."""
        name = posixpath.normpath(name)
        for _ in range(_MAX_LINKS):
            if name not in self._links:
                break
            name = self._links[name]
        return self._members.get(name)

    def close(self) -> None:
        """See `Files`."""
        os.close(self._fd)


class _Frugal:
    """A file that refuses giant reads: tarfile reads extended headers whole, whatever size they claim."""

    def __init__(self, file: object) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        if size > MAX_DOCUMENT:
            raise ValueError("a header is too large")
        return self._file.read(size)  # type: ignore[attr-defined,no-any-return]

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)  # type: ignore[attr-defined,no-any-return]

    def tell(self) -> int:
        return self._file.tell()  # type: ignore[attr-defined,no-any-return]


class Image(msgspec.Struct, frozen=True):
    """One image in an archive. ``manifest_digest`` is empty where the archive has no manifests."""

    names: tuple[str, ...]
    manifest: Manifest
    manifest_digest: str


class Layout:
    """An OCI layout."""

    def __init__(self, files: Files) -> None:
        self._files = files

    @staticmethod
    def fits(files: Files) -> bool:
        """Whether these are the files of a layout."""
        return files.find("oci-layout") is not None and files.find("index.json") is not None

    async def images(self, wanted: Platform) -> list[Image]:
        """Return the images for a platform: one for each name, or one when there are no names."""
        index = parse_index(await _document(self._files, "index.json"))
        groups: dict[str, list[Descriptor]] = {}
        for entry in index.manifests:
            annotations = entry.annotations or {}
            groups.setdefault(next(filter(None, map(annotations.get, _NAMES)), ""), []).append(entry)
        return [await self._image(name, entries, wanted) for name, entries in groups.items()]

    async def _image(self, name: str, entries: list[Descriptor], wanted: Platform) -> Image:
        for _ in range(_MAX_LINKS):
            entry = select(entries, wanted)
            data = await self._verified(entry, "manifest")
            document = parse_manifest(data, entry.media_type)
            if isinstance(document, Manifest):
                return Image((name,) if name else (), document, entry.digest)
            entries = document.manifests
        raise ImageError("the indexes are nested too deep")

    async def config(self, descriptor: Descriptor) -> bytes:
        """Read a config."""
        return await self._verified(descriptor, "config")

    def blob(self, descriptor: Descriptor) -> AsyncGenerator[bytes]:
        """Read a layer (not verified)."""
        return _extent(self._files, _blob_name(descriptor)).stream()

    async def _verified(self, descriptor: Descriptor, what: str) -> bytes:
        data = await _document(self._files, _blob_name(descriptor))
        verify(data, descriptor.digest, what)
        return data


class _Saved(msgspec.Struct, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class DockerArchive:
    """What ``docker save`` writes. Layers are known by their names only; the config's diff ids prove them."""

    def __init__(self, files: Files) -> None:
        self._files = files

    @staticmethod
    def fits(files: Files) -> bool:
        """Whether these are the files of such an archive."""
        return files.find("manifest.json") is not None

    async def images(self, wanted: Platform) -> list[Image]:
        """Return all images. The platform is not known before the config is read."""
        data = await _document(self._files, "manifest.json")
        try:
            saved = msgspec.json.decode(data, type=list[_Saved])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ImageError(f"manifest.json cannot be understood: {str(error)[:200]}") from error
        return [await self._image(entry) for entry in saved]

    async def _image(self, saved: _Saved) -> Image:
        config = await _document(self._files, saved.config)
        members = {"member": saved.config}
        layers = [
            Descriptor("", _extent(self._files, name).size, annotations={"member": name}) for name in saved.layers
        ]
        manifest = Manifest(Descriptor(sha256(config), len(config), annotations=members), layers)
        return Image(tuple(saved.repo_tags or ()), manifest, "")

    async def config(self, descriptor: Descriptor) -> bytes:
        """Read a config."""
        return await _document(self._files, (descriptor.annotations or {})["member"])

    def blob(self, descriptor: Descriptor) -> AsyncGenerator[bytes]:
        """Read a layer (not verified)."""
        return _extent(self._files, (descriptor.annotations or {})["member"]).stream()


def _blob_name(descriptor: Descriptor) -> str:
    return "blobs/" + descriptor.digest.replace(":", "/")


def _extent(files: Files, name: str) -> Extent:
    extent = files.find(name) if not name.startswith("/") and ".." not in name.split("/") else None
    if extent is None:
        raise ImageError(f"{name[:200]!r} is missing")
    return extent


async def _document(files: Files, name: str) -> bytes:
    return await _extent(files, name).read()
