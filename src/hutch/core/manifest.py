"""OCI and Docker image documents: what a hostile registry may say, checked and made small.

Sources: OCI image-spec v1.1 (manifest.md, image-index.md, config.md, descriptor.md, layer.md) and Docker's "Image
Manifest Version 2, Schema 2". All functions raise `ImageError`; the caller adds which image it is about.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from hutch.core.ociref import is_digest
from hutch.errors import ImageError
from hutch.types import ImageInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

_T = TypeVar("_T")

MAX_DOCUMENT: Final = 4 << 20
"""Largest manifest, index or config that is read, in bytes (what registries themselves accept)."""
MAX_LAYERS: Final = 127
"""What overlay file systems can stack."""

INDEX_TYPES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_CONFIG_TYPES: Final = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)
_LAYER_TYPES: Final = frozenset(
    {
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
    }
)
_FOREIGN = re.compile(r"foreign|nondistributable")
# The variant that a machine of this architecture runs, best first (containerd's platform matching).
_VARIANTS: Final[dict[str, tuple[str, ...]]] = {
    "arm": ("v7", "", "v6", "v5"),
    "arm64": ("v8", ""),
    "amd64": ("", "v1"),
}
_ARCHITECTURES: Final = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "i386": "386",
    "i686": "386",
    "x86": "386",
    "loongarch64": "loong64",
}


class Platform(msgspec.Struct, frozen=True):
    """What an image is for."""

    os: str = ""
    architecture: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """A pointer to content. ``digest`` is empty only in a descriptor made for an archive that does not give one."""

    digest: str
    size: int
    media_type: str = ""
    urls: list[str] | None = None
    annotations: dict[str, str] | None = None
    platform: Platform | None = None


class Index(msgspec.Struct, frozen=True, rename="camel"):
    """Several images under one name."""

    manifests: list[Descriptor]


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """One image. ``layers`` stand in the order of application, the lowest first."""

    config: Descriptor
    layers: list[Descriptor]


class _Process(msgspec.Struct, frozen=True, rename="pascal"):
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None
    labels: dict[str, str] | None = None
    stop_signal: str | None = None


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: list[str]


class Config(msgspec.Struct, frozen=True):
    """The image's configuration, as far as it is used."""

    rootfs: _RootFs
    architecture: str = ""
    os: str = ""
    variant: str = ""
    created: str | None = None
    config: _Process | None = None


class _Kind(msgspec.Struct, frozen=True, rename="camel"):
    schema_version: int | None = None
    media_type: str = ""
    manifests: msgspec.Raw = msgspec.Raw()
    layers: msgspec.Raw = msgspec.Raw()


def parse_platform(text: str) -> Platform:
    """Parse ``os/arch[/variant]`` or ``arch``; a machine's own name (``x86_64``) is understood as well."""
    parts = text.lower().split("/")
    if len(parts) == 1:
        parts = ["linux", *parts]
    if len(parts) > 3 or not all(re.fullmatch(r"[a-z0-9_.-]+", part) for part in parts):
        raise ImageError(f"{text!r} is not a platform; write it like linux/amd64 or linux/arm/v7")
    system, machine, *variant = parts
    known = {"armv6l": "v6"}.get(machine, "")
    return Platform(system, _ARCHITECTURES.get(machine, machine), variant[0] if variant else known)


def parse_manifest(data: bytes, media_type: str = "") -> Index | Manifest:
    """Read an index or a manifest. ``media_type``, the transport's word, counts where the document has none."""
    kind = _decode(data, _Kind, "manifest")
    said = kind.media_type or media_type
    if kind.schema_version == 1 or "distribution.manifest.v1" in said:
        raise ImageError("the manifest has Docker's obsolete schema 1; push the image again with a current tool")
    if bytes(kind.layers) and bytes(kind.manifests):
        raise ImageError("the manifest is ambiguous: it has both layers and manifests")
    if said in INDEX_TYPES or (said not in MANIFEST_TYPES and bytes(kind.manifests)):
        index = _decode(data, Index, "index")
        for entry in index.manifests:
            _check_descriptor(entry, "index entry")
        return index
    manifest = _decode(data, Manifest, "manifest")
    _check_manifest(manifest)
    return manifest


def parse_index(data: bytes) -> Index:
    """Read a document that must be an index (``index.json`` of a layout)."""
    document = parse_manifest(data, INDEX_TYPES[0])
    if not isinstance(document, Index):
        raise ImageError("the index is a manifest")
    return document


def parse_config(data: bytes, layers: int) -> Config:
    """Read a configuration that must describe ``layers`` layers."""
    config = _decode(data, Config, "config")
    ids = config.rootfs.diff_ids
    if len(ids) != layers:
        raise ImageError(f"the config names {len(ids)} layers and the manifest {layers}")
    if len(ids) > MAX_LAYERS:
        raise ImageError(f"the image has {len(ids)} layers; at most {MAX_LAYERS} are supported")
    for diff_id in ids:
        if not is_digest(diff_id):
            raise ImageError(f"the config has a malformed diff id {diff_id[:100]!r}")
    return config


def select(entries: Sequence[Descriptor], wanted: Platform) -> Descriptor:
    """Choose the entry of an index for a platform; the first of the best variant wins.

    An asked-for variant must be there; otherwise the architecture's usual order of variants decides. An only entry
    without a platform is taken: its config will tell.
    """
    if len(entries) == 1 and entries[0].platform is None:
        return entries[0]
    there = [(entry, entry.platform) for entry in entries if entry.platform is not None]
    for variant in (wanted.variant,) if wanted.variant else _VARIANTS.get(wanted.architecture, ("",)):
        for entry, platform in there:
            if platform == Platform(wanted.os, wanted.architecture, variant):
                return entry
    # "unknown" is the platform of attestations, which are no images.
    names = sorted({str(platform) for _, platform in there if platform.os != "unknown"})
    raise ImageError(f"there is no image for {wanted}; there are: {', '.join(names[:40])[:500] or 'none'}")


def check_platform(config: Config, wanted: Platform) -> None:
    """Refuse an image for another system (an image that does not say is taken at its word)."""
    is_for = Platform(config.os or wanted.os, config.architecture or wanted.architecture, config.variant)
    if (is_for.os, is_for.architecture) != (wanted.os, wanted.architecture):
        raise ImageError(f"the image is for {is_for}, not for {wanted}")


def image_info(
    config: Config, *, digest: str, manifest_digest: str, size: int, wanted: Platform, now: float
) -> ImageInfo:
    """Make the record of an image. ``now`` stands in for a creation time that the config does not give."""
    process = config.config or _Process()
    return ImageInfo(
        digest=digest,
        references=(),
        manifest_digest=manifest_digest,
        architecture=config.architecture or wanted.architecture,
        os=config.os or wanted.os,
        size=size,
        layers=tuple(config.rootfs.diff_ids),
        created_at=_unix_time(config.created, now),
        entrypoint=tuple(process.entrypoint or ()),
        cmd=tuple(process.cmd or ()),
        env=tuple(process.env or ()),
        workdir=process.working_dir or "",
        user=process.user or "",
        labels=process.labels or {},
        stop_signal=process.stop_signal or "",
    )


def make_config(diff_id: str, platform: Platform, *, cmd: Sequence[str], env: Sequence[str]) -> bytes:
    """Write the configuration of a one-layer image. Equal input gives equal bytes, hence the same image."""
    document = {
        "architecture": platform.architecture,
        "os": platform.os,
        "config": {"Cmd": list(cmd), "Env": list(env)},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    }
    return msgspec.json.encode(document)


def sha256(data: bytes) -> str:
    """Return the digest of a document."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def verify(data: bytes, digest: str, what: str) -> None:
    """Refuse bytes that are not those which the digest names."""
    algorithm = digest.partition(":")[0]
    actual = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
    if actual != digest:
        raise ImageError(f"{what}: the content has the digest {actual}, not {digest}")


def _check_manifest(manifest: Manifest) -> None:
    if manifest.config.media_type not in ("", *_CONFIG_TYPES):
        raise ImageError(f"this is an artifact with the config type {manifest.config.media_type[:100]!r}, not an image")
    if len(manifest.layers) > MAX_LAYERS:
        raise ImageError(f"the image has {len(manifest.layers)} layers; at most {MAX_LAYERS} are supported")
    _check_descriptor(manifest.config, "config")
    if manifest.config.size > MAX_DOCUMENT:
        raise ImageError(f"the config has {manifest.config.size} bytes; at most {MAX_DOCUMENT} are read")
    for layer in manifest.layers:
        _check_descriptor(layer, "layer")
        if _FOREIGN.search(layer.media_type) or layer.urls:
            raise ImageError(f"{layer.digest} is a foreign layer (kept outside the registry); these are refused")
        if layer.media_type not in _LAYER_TYPES:
            kind = layer.media_type[:100]
            raise ImageError(f"layer {layer.digest} has the unsupported media type {kind!r}")


def _check_descriptor(descriptor: Descriptor, what: str) -> None:
    if not is_digest(descriptor.digest):
        raise ImageError(f"the {what} has a malformed or unsupported digest {descriptor.digest[:150]!r}")
    if descriptor.size < 0:
        raise ImageError(f"the {what} {descriptor.digest} has a negative size")


def _decode(data: bytes, kind: type[_T], what: str) -> _T:
    if len(data) > MAX_DOCUMENT:
        raise ImageError(f"the {what} has {len(data)} bytes; at most {MAX_DOCUMENT} are read")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"the {what} cannot be understood: {str(error)[:200]}") from error


def _unix_time(text: str | None, otherwise: float) -> float:
    try:
        moment = datetime.fromisoformat(text or "")
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return otherwise
