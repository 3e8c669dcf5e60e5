"""The local image store: pulls and loads images, hands out their layers, forgets them."""

from __future__ import annotations

import platform as _platform
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from hutch.core import ociref
from hutch.core.manifest import Manifest, Platform, parse_manifest, parse_platform, select, sha256
from hutch.errors import (
    ImageError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    ResourceExhaustedError,
    StorageError,
)
from hutch.image import bootstrap
from hutch.image.bundle import chosen, opened
from hutch.image.config import RegistryConfig
from hutch.image.disk import Disk, short
from hutch.image.helper import remove_tree
from hutch.image.install import Installer
from hutch.types import ImageInfo, Progress

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence
    from pathlib import Path

    from hutch.core.ociref import Reference
    from hutch.image.install import Report

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_MIN_PREFIX: Final = 6
_MAX_NESTING: Final = 4


class ImageStore:
    """The images of one home. Several processes may use one store at once; `hutch.image.disk` says how.

    All methods may raise `StorageError` when the disk fails.
    """

    def __init__(self, root: Path, *, config: RegistryConfig | None = None) -> None:
        self._disk = Disk(root)
        self._config = config or RegistryConfig()
        self._installer = Installer(self._disk, self._config)

    async def pull(
        self,
        reference: str,
        *,
        platform: str | None = None,
        always: bool = False,
        progress: Report | None = None,
    ) -> ImageInfo:
        """Fetch an image from its registry; unless ``always``, a local image of that name is good enough.

        ``platform`` is ``os/arch[/variant]`` (default: this machine's). ``progress`` is called in the event loop's
        thread.

        Raises `ImageError`, `ResourceExhaustedError` (a layer exceeds a limit), `InvalidArgumentError` (malformed
        reference), `ConfigError` (unusable credentials file).
        """
        from hutch.image.registry import Registry  # loads the HTTP client, which is slow

        report = progress or _ignore
        name = ociref.parse(reference)
        with _about(name.familiar):
            wanted = _wanted(platform)
            if not always and (info := self._local(name)) and (platform is None or _fits(info, wanted)):
                report(Progress(phase="exists", item=info.digest))
                return info
            await self._prepare()
            report(Progress(phase="resolve", item=name.familiar))
            async with Registry(name, self._config) as registry:
                target = name.target
                for _ in range(_MAX_NESTING):
                    document = await registry.manifest(target)
                    found = parse_manifest(document.data, document.media_type)
                    if isinstance(found, Manifest):
                        return await self._installer.image(
                            registry,
                            found,
                            manifest_digest=sha256(document.data),
                            wanted=wanted,
                            names=[name],
                            report=report,
                        )
                    target = select(found.manifests, wanted).digest
                raise ImageError("the indexes are nested too deep")

    async def load(
        self,
        path: Path,
        *,
        reference: str | None = None,
        platform: str | None = None,
        progress: Report | None = None,
    ) -> Sequence[ImageInfo]:
        """Add the images of a file or folder: an OCI layout or a ``docker save`` archive (as a folder or a tar,
        compressed or not), or a plain root file system (likewise), which needs a ``reference``.

        With a ``reference``, an archive's only image gets that name; of several, the one that has it is loaded.

        Raises `ImageError`, `ResourceExhaustedError`, `InvalidArgumentError`.
        """
        report = progress or _ignore
        name = ociref.parse(reference) if reference is not None else None
        with _about(str(path)):
            wanted = _wanted(platform)
            await self._prepare()
            async with opened(path, self._disk.tmp, self._config.max_layer_bytes) as bundle:
                if bundle.archive is None:
                    if name is None:
                        raise InvalidArgumentError(f"{path} is a plain root file system: name it with `reference`")
                    return [await self._installer.rootfs(bundle.rootfs(), platform=wanted, name=name, report=report)]
                return [
                    await self._installer.image(
                        bundle.archive,
                        image.manifest,
                        manifest_digest=image.manifest_digest,
                        wanted=wanted,
                        names=names,
                        report=report,
                    )
                    for image, names in chosen(await bundle.archive.images(wanted), name)
                ]

    async def bootstrap(
        self,
        *,
        reference: str,
        packages: Sequence[str] = (),
        suite: str = "bookworm",
        flavour: str = "debian",
        progress: Report | None = None,
    ) -> ImageInfo:
        """Make a base image from the machine's own apt mirror: a minimal Debian of the suite with the packages, or
        (``flavour="busybox"``) the static busybox.

        Raises `ImageError`, `InvalidArgumentError`.
        """
        report = progress or _ignore
        name = ociref.parse(reference)
        with _about(name.familiar):
            wanted = _wanted(None)
            await self._prepare()
            if flavour == "busybox":
                return await bootstrap.busybox(self._installer, name, platform=wanted, report=report)
            if flavour != "debian":
                raise InvalidArgumentError(f"{flavour!r} is not a flavour; choose debian or busybox")
            return await bootstrap.debian(
                self._installer, name, suite=suite, packages=packages, platform=wanted, report=report
            )

    def get(self, reference: str) -> ImageInfo:
        """Return a local image by reference, config digest, or a prefix of the digest (6 digits or more).

        Raises `NotFoundError`; `InvalidArgumentError` when several digests have the prefix.
        """
        return self._find(reference)[0]

    def list(self) -> list[ImageInfo]:
        """Return all local images, the newest first."""
        infos = [self._disk.with_names(info) for info in self._disk.records()]
        return sorted(infos, key=lambda info: (-info.created_at, info.digest))

    def layer_paths(self, image: ImageInfo) -> tuple[Path, ...]:
        """Return the folders of the unpacked layers, the topmost first, each once.

        A layer that an image has twice counts where it is topmost: there it hides its lower self entirely.

        Raises `ImageError` when one is missing.
        """
        paths = tuple(self._disk.layer(diff_id) / "fs" for diff_id in dict.fromkeys(reversed(image.layers)))
        for path in paths:
            if not path.is_dir():
                raise ImageError(f"image {image.digest}: the layer {path.parent.name} is missing; pull it again")
        return paths

    async def tag(self, reference: str, name: str) -> ImageInfo:
        """Give an image another name, which another image loses if it has it. Returns the image.

        Raises `NotFoundError`; `InvalidArgumentError` for a name that is none, or has a digest.
        """
        new = ociref.parse(name)
        if new.digest:
            raise InvalidArgumentError(f"{name[:300]!r} has a digest; a name has a tag only")
        await self._prepare()
        async with self._disk.index_lock():
            info, _ = self._find(reference)
            self._disk.write_references({**self._disk.references(), str(new): info.digest})
        return self._disk.with_names(info)

    async def remove(self, reference: str, *, in_use: Container[str] = ()) -> Sequence[str]:
        """Remove a name, and with its last name the image; by digest: the image with all its names.

        ``in_use`` holds the digests of images that boxes are made from. Returns the names and digests removed.

        Raises `NotFoundError`, `InvalidStateError` when the image would have to go but is in use.
        """
        await self._prepare()
        async with self._disk.index_lock():
            info, named = self._find(reference)
            references = self._disk.references()
            names = [name for name, digest in references.items() if digest == info.digest]
            going = [str(named)] if named else names
            last = set(going) == set(names)
            if last and info.digest in in_use:
                raise InvalidStateError(f"image {reference!r} ({info.digest}) is used by a box; remove the box first")
            self._disk.write_references({name: digest for name, digest in references.items() if name not in going})
            if last:
                self._disk.delete_record(info.digest)
                self._detach_layers()
        await self._disk.sweep(remove_tree)
        removed = [ociref.parse(name).familiar for name in going]
        return [*removed, info.digest] if last else removed

    async def prune(self, *, in_use: Container[str] = (), all: bool = False) -> int:
        """Remove images without a name (``all``: all that are not in use) and whatever dead processes left.

        Returns the size of the layers removed, in bytes.
        """
        await self._prepare()
        async with self._disk.index_lock():
            references = self._disk.references()
            named = set() if all else set(references.values())
            for info in self._disk.records():
                if info.digest not in named and info.digest not in in_use:
                    references = {name: digest for name, digest in references.items() if digest != info.digest}
                    self._disk.write_references(references)
                    self._disk.delete_record(info.digest)
            self._disk.drop_leftovers()
            freed = self._detach_layers()
        await self._disk.sweep(remove_tree)
        return freed

    async def _prepare(self) -> None:
        self._disk.prepare()
        await self._disk.sweep(remove_tree)

    def _detach_layers(self) -> int:
        keep = {short(diff_id) for info in self._disk.records() for diff_id in info.layers}
        return self._disk.detach_layers(keep)

    def _local(self, name: Reference) -> ImageInfo | None:
        digest = self._disk.references().get(str(name))
        info = self._disk.read_record(digest) if digest else None
        return self._disk.with_names(info) if info else None

    def _find(self, text: str) -> tuple[ImageInfo, Reference | None]:
        """Return an image, and the reference when the text is one."""
        # Each start of a box asks by digest: that must not read the records of all images.
        if _DIGEST.fullmatch(text) and (exact := self._disk.read_record(text)):
            return self._disk.with_names(exact), None
        try:
            name = ociref.parse(text)
        except InvalidArgumentError:
            name = None
        if name and (info := self._local(name)):
            return info, name
        prefix = text.removeprefix("sha256:").lower()
        found = [info for info in self._disk.records() if short(info.digest).startswith(prefix)]
        if len(prefix) < _MIN_PREFIX or not found:
            raise NotFoundError(f"there is no image {text[:300]!r} here; pull or load it first")
        if len(found) > 1:
            raise InvalidArgumentError(f"{text!r} is the beginning of {len(found)} images' digests; give more of it")
        return self._disk.with_names(found[0]), None


def _ignore(progress: Progress) -> None:
    pass


def _wanted(text: str | None) -> Platform:
    return parse_platform(text or f"linux/{_platform.machine()}")


def _fits(info: ImageInfo, wanted: Platform) -> bool:
    return (info.os, info.architecture) == (wanted.os, wanted.architecture)


@contextmanager
def _about(what: str) -> Iterator[None]:
    """Let errors say which image they are about."""
    try:
        yield
    except (ImageError, ResourceExhaustedError) as error:
        raise type(error)(f"image {what!r}: {error}") from error
    except OSError as error:
        raise StorageError(f"image {what!r}: {error}") from error
