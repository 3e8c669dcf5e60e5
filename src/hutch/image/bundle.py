"""What kind of image a file or folder holds."""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread

from hutch.core import ociref
from hutch.errors import ImageError, InvalidArgumentError, ResourceExhaustedError
from hutch.image.archive import DockerArchive, Extent, Files, FolderFiles, Image, Layout, TarFiles
from hutch.image.decompress import Decoder, is_compressed
from hutch.image.helper import pack_argv

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from hutch.core.ociref import Reference

_CHUNK: Final = 1 << 20


class Bundle:
    """An opened file or folder. ``archive`` is ``None`` for a plain root file system."""

    def __init__(self, files: Files, source: Path | Extent) -> None:
        self.archive: Layout | DockerArchive | None = None
        if Layout.fits(files):
            self.archive = Layout(files)
        elif DockerArchive.fits(files):
            self.archive = DockerArchive(files)
        self._source = source

    def rootfs(self) -> AsyncGenerator[bytes]:
        """Yield the root file system as a tar."""
        return self._source.stream() if isinstance(self._source, Extent) else _packed(self._source)


@asynccontextmanager
async def opened(path: Path, tmp: Path, max_bytes: int) -> AsyncIterator[Bundle]:
    """Look what is there. A compressed archive is first decompressed into ``tmp``, to at most ``max_bytes``.

    Raises `ImageError` for what is neither, `ResourceExhaustedError`.
    """
    if path.is_dir():
        files: Files = FolderFiles(path)
        source: Path | Extent = path
    else:
        try:
            fd = await anyio.to_thread.run_sync(_plain, path, tmp, max_bytes)
        except OSError as error:
            raise ImageError(f"it cannot be read: {error.strerror}") from error
        source = Extent(fd, 0, os.fstat(fd).st_size)
        try:
            files = await anyio.to_thread.run_sync(TarFiles, fd)
        except BaseException:
            os.close(fd)
            raise
    try:
        yield Bundle(files, source)
    finally:
        files.close()


def _plain(path: Path, tmp: Path, max_bytes: int) -> int:
    """Open an archive; where it is compressed, a nameless file with its plain content instead."""
    with path.open("rb") as file:
        chunk = file.read(_CHUNK)
        if not is_compressed(chunk):
            return os.dup(file.fileno())
        decoder = Decoder()
        with tempfile.TemporaryFile(dir=tmp) as plain:
            while chunk:
                for piece in decoder.feed(chunk):
                    plain.write(piece)
                    if plain.tell() > max_bytes:
                        raise ResourceExhaustedError(f"it unpacks to more than {max_bytes} bytes (max_layer_bytes)")
                chunk = file.read(_CHUNK)
            plain.writelines(decoder.finish())
            plain.flush()
            return os.dup(plain.fileno())


async def _packed(path: Path) -> AsyncGenerator[bytes]:
    """Yield a folder as a tar."""
    async with await anyio.open_process(pack_argv(path), stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        async for chunk in process.stdout:
            yield chunk
        cause = b"".join([chunk async for chunk in process.stderr])
        if await process.wait() != 0:
            raise ImageError(f"it cannot be read: {cause.decode('utf-8', 'replace').strip()[-300:]}")


def chosen(images: Sequence[Image], name: Reference | None) -> Iterator[tuple[Image, list[Reference]]]:
    """Yield the images to load, and the names that they get.

    Raises `ImageError` when there is none, `InvalidArgumentError` when ``name`` does not tell which.
    """
    if not images:
        raise ImageError("there is no image in it")
    if name is None:
        yield from ((image, [name_ for text in image.names if (name_ := _parsed(text))]) for image in images)
        return
    fitting = [image for image in images if any(text == name.tag or _parsed(text) == name for text in image.names)]
    if len(images) == 1:
        fitting = list(images)
    if len(fitting) != 1:
        names = ", ".join(text for image in images for text in image.names)
        raise InvalidArgumentError(f"it holds {len(images)} images; choose one of: {names[:500]}")
    yield fitting[0], [name]


def _parsed(text: str) -> Reference | None:
    """Read a name in an archive; a mere tag names nothing."""
    try:
        return ociref.parse(text) if "/" in text or ":" in text else None
    except InvalidArgumentError:
        return None
