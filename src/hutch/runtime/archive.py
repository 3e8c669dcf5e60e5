"""Box archives: export and import.

    hutch-box.json        format, record of the box, list of layers (name, sha256, size), bottom first
    layers/0.tar.zst …    one a layer, with OCI whiteouts (OCI image spec, "Representing Changes") and image owners

An archive comes from anywhere: members, sizes and digests are checked, and layers are unpacked by the same confined
child that unpacks images.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import anyio
import anyio.to_thread
import msgspec

from hutch.errors import HutchError, InvalidArgumentError, StorageError
from hutch.host import mapping
from hutch.host.binary import agent_path
from hutch.image import RegistryConfig
from hutch.image.unpack import Blob, unpack_blob
from hutch.runtime.home import new_id
from hutch.runtime.spec import check_spec
from hutch.state import BoxRecord
from hutch.types import BoxState

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Sequence

    from hutch.engine.base import Engine
    from hutch.runtime.home import Home

FORMAT = 1
MANIFEST = "hutch-box.json"
MAX_LAYERS = 256
MAX_MANIFEST = 4 << 20
# An archive's layers have the same bounds as those of an image.
_LIMITS = RegistryConfig()
_CHUNK = 1 << 20


class LayerEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer in the manifest; ``size`` is that of the compressed member."""

    name: str
    sha256: str
    size: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first member of an archive. ``sha256`` is that of the manifest itself without it."""

    format: int
    box: BoxRecord
    layers: tuple[LayerEntry, ...]
    sha256: str = ""

    def signed(self) -> Manifest:
        """The manifest with its own digest."""
        bare = msgspec.structs.replace(self, sha256="")
        return msgspec.structs.replace(self, sha256=hashlib.sha256(msgspec.json.encode(bare)).hexdigest())


LayerWriter = Callable[[Path], Awaitable[str]]
"""Writes a layer to a new file, as a compressed tar, and returns its SHA-256."""


def folder(source: Path, *, owned_by_box: bool) -> LayerWriter:
    """A layer that is a folder of the host; ``owned_by_box``: its owners are those of the box."""

    async def write(target: Path) -> str:
        return await anyio.to_thread.run_sync(_pack, source, owned_by_box, target)

    return write


def stream(chunks: AsyncIterable[bytes]) -> LayerWriter:
    """A layer that comes as a tar."""

    async def write(target: Path) -> str:
        digest = hashlib.sha256()
        compressor = zstd.ZstdCompressor(level=3)
        with target.open("wb") as out:
            async for piece in chunks:
                _put(out, digest, await anyio.to_thread.run_sync(compressor.compress, piece))
            _put(out, digest, compressor.flush())
        return digest.hexdigest()

    return write


async def write(path: Path, record: BoxRecord, layers: Sequence[LayerWriter]) -> None:
    """Write an archive of a box with these layers (topmost first), atomically. Raises `StorageError`."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            entries = []
            files = []
            for number, layer in enumerate(reversed(layers)):
                file = Path(scratch) / str(number)
                digest = await layer(file)
                files.append(file)
                entries.append(LayerEntry(f"layers/{number}.tar.zst", digest, file.stat().st_size))
            manifest = Manifest(FORMAT, _portable(record), tuple(entries)).signed()
            whole = Path(scratch) / "archive"
            await anyio.to_thread.run_sync(_assemble, whole, manifest, files)
            whole.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write the archive {path}: {error.strerror or error}") from error


async def read(path: Path, home: Home, engine: Engine) -> tuple[BoxRecord, tuple[str, ...]]:
    """Unpack an archive's layers into frozen disks; returns the box's record as it was written and the disks,
    topmost first.

    Raises `InvalidArgumentError` for what is not a sound archive; nothing of it stays then.
    """
    made: list[str] = []
    try:
        with await anyio.to_thread.run_sync(_open, path) as file:
            archive = await anyio.to_thread.run_sync(_reading, path, file)
            manifest = await anyio.to_thread.run_sync(_manifest, path, archive)
            for entry in manifest.layers:
                member = await anyio.to_thread.run_sync(_member, path, archive, entry)
                name = f"{new_id()}-image"
                made.append(name)
                blob = Blob(digest=f"sha256:{entry.sha256}", size=entry.size)
                home.disk(name).mkdir(mode=0o755)
                await unpack_blob(_chunks(member), blob, home.disk(name), config=_LIMITS)
    except (HutchError, tarfile.TarError) as error:
        await _discard(made, home, engine)
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"the archive {path} is damaged or was tampered with: {error}") from error
    except BaseException:
        await _discard(made, home, engine)
        raise
    return manifest.box, tuple(reversed(made))


async def _discard(names: list[str], home: Home, engine: Engine) -> None:
    with anyio.CancelScope(shield=True):
        for name in names:
            await engine.remove_tree(home.disk(name))


def _portable(record: BoxRecord) -> BoxRecord:
    """The record without what means something on this host only."""
    spec = msgspec.structs.replace(record.spec, mounts=(), secrets=(), name=None)
    return msgspec.structs.replace(
        record,
        spec=spec,
        state=BoxState.CONFIGURED,
        pid=None,
        reason=None,
        disks=(),
        image_digest="",
        unenforced=(),
        published=(),
        bounds=None,
        sealed=b"",
    )


def _pack(source: Path, owned_by_box: bool, target: Path) -> str:
    ids = mapping.current()
    argv = [str(agent_path()), "pack", "--source", str(source), "--layer"]
    if ids.rootless:
        argv.append("--userxattr")
    elif owned_by_box:
        argv += ["--shift", str(mapping.ROOT_BASE)]
    digest = hashlib.sha256()
    with target.open("wb") as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(ids.wrap(argv), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, stderr=errors)
        assert process.stdout is not None
        try:
            compressor = zstd.ZstdCompressor(level=3)
            while piece := process.stdout.read(_CHUNK):
                _put(out, digest, compressor.compress(piece))
            _put(out, digest, compressor.flush())
        except BaseException:
            process.kill()
            raise
        finally:
            process.stdout.close()
            process.wait()
        if process.returncode:
            errors.seek(0)
            cause = errors.read(500).decode("utf-8", "replace").strip()
            raise StorageError(f"the layer {source.name} cannot be packed: {cause or process.returncode}")
    return digest.hexdigest()


def _put(out: BinaryIO, digest: hashlib._Hash, data: bytes) -> None:
    out.write(data)
    digest.update(data)


def _assemble(path: Path, manifest: Manifest, files: list[Path]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        data = msgspec.json.encode(manifest)
        info = tarfile.TarInfo(MANIFEST)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
        for entry, file in zip(manifest.layers, files, strict=True):
            info = tarfile.TarInfo(entry.name)
            info.size = entry.size
            with file.open("rb") as content:
                archive.addfile(info, content)
    os.chmod(path, 0o600)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidArgumentError(f"the archive {path} cannot be read: {error.strerror}") from error


def _reading(path: Path, file: BinaryIO) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise InvalidArgumentError(f"{path} is not a box archive: {error}") from error


def _manifest(path: Path, archive: tarfile.TarFile) -> Manifest:
    member = _next(path, archive, MANIFEST)
    if member.size > MAX_MANIFEST:
        raise InvalidArgumentError(f"the archive {path} has a manifest of {member.size} bytes")
    content = archive.extractfile(member)
    try:
        data = content.read() if content is not None else b""
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"the archive {path} has a manifest that cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise InvalidArgumentError(f"the archive {path} has format {manifest.format}; this version reads {FORMAT}")
    if manifest.signed() != manifest:
        raise InvalidArgumentError(
            f"the archive {path} is damaged or was tampered with: its manifest has another digest"
        )
    if not 1 <= len(manifest.layers) <= MAX_LAYERS:
        raise InvalidArgumentError(f"the archive {path} has {len(manifest.layers)} layers")
    box = manifest.box
    if box.spec.mounts or box.spec.secrets or box.sealed or box.disks or box.image_digest or box.pid:
        raise InvalidArgumentError(f"the archive {path} names things of another host")
    check_spec(msgspec.structs.replace(box.spec, env=box.env, workdir=box.workdir))
    return manifest


def _member(path: Path, archive: tarfile.TarFile, entry: LayerEntry) -> BinaryIO:
    member = _next(path, archive, entry.name)
    if member.size != entry.size:
        raise InvalidArgumentError(f"the archive {path}: {entry.name} has another size than the manifest says")
    content = archive.extractfile(member)
    if content is None:
        raise InvalidArgumentError(f"the archive {path}: {entry.name} is not a file")
    return content  # type: ignore[return-value]  # a buffered reader


def _next(path: Path, archive: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    try:
        member = archive.next()
    except (tarfile.TarError, OSError, ValueError) as error:
        raise InvalidArgumentError(f"the archive {path} is damaged: {error}") from error
    if member is None or member.name != name or not member.isreg() or member.issparse():
        found = "nothing" if member is None else repr(member.name[:80])
        raise InvalidArgumentError(f"the archive {path} has {found} where {name} should be")
    return member


async def _chunks(content: BinaryIO) -> AsyncGenerator[bytes]:
    while data := await anyio.to_thread.run_sync(content.read, _CHUNK):
        yield data
