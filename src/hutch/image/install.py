"""Making an image part of the store: its layers first, then its record and names."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, asynccontextmanager, closing
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import anyio

from hutch.core.manifest import check_platform, image_info, make_config, parse_config, sha256
from hutch.image._tasks import together
from hutch.image.disk import POLL, LayerInfo, short
from hutch.image.helper import remove_tree
from hutch.image.unpack import Blob, Unpacked, unpack_blob
from hutch.types import ImageInfo, Progress

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
    from pathlib import Path

    from hutch.core.manifest import Descriptor, Manifest, Platform
    from hutch.core.ociref import Reference
    from hutch.image.config import RegistryConfig
    from hutch.image.disk import Disk

Report = Callable[[Progress], None]

_PLAIN_ENV: Final = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",)
_PLAIN_COMMAND: Final = ("/bin/sh",)


class Source(Protocol):
    """Where an image's config and layers come from."""

    async def config(self, descriptor: Descriptor) -> bytes:
        """Return the config's bytes, which are those of the digest."""

    def blob(self, descriptor: Descriptor) -> AsyncGenerator[bytes]:
        """Yield a layer's bytes as they are, unchecked."""


class Installer:
    """Adds images to a store. Any number may work on one store, in any processes."""

    def __init__(self, disk: Disk, config: RegistryConfig) -> None:
        self._disk = disk
        self._config = config

    async def image(
        self,
        source: Source,
        manifest: Manifest,
        *,
        manifest_digest: str,
        wanted: Platform,
        names: Sequence[Reference],
        report: Report,
    ) -> ImageInfo:
        """Add an image and give it the names. Raises `ImageError` or `ResourceExhaustedError`."""
        config = parse_config(await source.config(manifest.config), len(manifest.layers))
        check_platform(config, wanted)
        # The same layer may occur twice in an image (empty ones often do).
        layers = dict(zip(config.rootfs.diff_ids, manifest.layers, strict=True))
        sizes: dict[str, int] = {}
        with ExitStack() as held:

            async def layer(diff_id: str, descriptor: Descriptor) -> None:
                make = partial(self._fetch, source, descriptor, diff_id, report)
                sizes[diff_id] = (await self._hold(held, diff_id, make, report)).size

            calls = [partial(layer, *item) for item in layers.items()]
            await together(*calls, limit=self._config.parallel_layers)
            info = image_info(
                config,
                digest=manifest.config.digest,
                manifest_digest=manifest_digest,
                size=sum(sizes.values()),
                wanted=wanted,
                now=time.time(),
            )
            return await self._record(info, names, report)

    async def rootfs(
        self, chunks: AsyncGenerator[bytes], *, platform: Platform, name: Reference, report: Report
    ) -> ImageInfo:
        """Add an image of one layer, made from a root file system's tar (plain or compressed)."""
        with ExitStack() as held:
            async with self._unpacked(chunks, Blob(), report) as (work, done):
                diff_id = done.diff_id

                async def adopt() -> None:
                    self._finish(work, done)

                layer = await self._hold(held, diff_id, adopt, report)
            config = make_config(diff_id, platform, cmd=_PLAIN_COMMAND, env=_PLAIN_ENV)
            record = image_info(
                parse_config(config, 1),
                digest=sha256(config),
                manifest_digest="",
                size=layer.size,
                wanted=platform,
                now=time.time(),
            )
            return await self._record(record, [name], report)

    async def _hold(
        self, held: ExitStack, diff_id: str, make: Callable[[], Awaitable[None]], report: Report
    ) -> LayerInfo:
        """Have a layer, made by us or by others, and keep it from being collected as long as ``held`` is open.

        Nobody waits for an exclusive lock while holding shared ones: two pulls that want the same layers in different
        orders would wait for each other.
        """
        name = short(diff_id)
        made = False
        while True:
            shared = self._disk.try_lock(name, shared=True)
            if shared is not None:
                if (info := self._disk.layer_info(diff_id)) is not None:
                    held.callback(shared.close)
                    report(Progress(phase="done" if made else "exists", item=diff_id))
                    return info
                shared.close()
            own = self._disk.try_lock(name)
            if own is None:
                await anyio.sleep(POLL)
                continue
            with closing(own):
                if self._disk.layer_info(diff_id) is None:
                    await make()
                    made = True

    async def _fetch(self, source: Source, descriptor: Descriptor, diff_id: str, report: Report) -> None:
        blob = Blob(digest=descriptor.digest, size=descriptor.size, diff_id=diff_id)
        async with self._unpacked(source.blob(descriptor), blob, report) as (work, done):
            self._finish(work, done)

    def _finish(self, work: Path, done: Unpacked) -> None:
        self._disk.finish_layer(work, done.diff_id, LayerInfo(size=done.size, entries=done.entries))

    @asynccontextmanager
    async def _unpacked(
        self, chunks: AsyncGenerator[bytes], blob: Blob, report: Report
    ) -> AsyncIterator[tuple[Path, Unpacked]]:
        """Unpack into a work folder, which is gone in the end unless it was made a layer."""

        def received(count: int) -> None:
            phase = "unpack" if count == blob.size else "download"
            report(Progress(phase=phase, item=blob.diff_id, done=count, total=blob.size))

        with self._disk.scratch() as work:
            try:
                yield (
                    work,
                    await unpack_blob(chunks, blob, work / "fs", config=self._config, received=received),
                )
            finally:
                with anyio.CancelScope(shield=True):
                    await remove_tree(work)

    async def _record(self, info: ImageInfo, names: Sequence[Reference], report: Report) -> ImageInfo:
        async with self._disk.index_lock():
            known = self._disk.read_record(info.digest)
            if known is None or known.manifest_digest != info.manifest_digest:
                self._disk.write_record(info)
            references = self._disk.references()
            references.update({str(name): info.digest for name in names})
            self._disk.write_references(references)
        report(Progress(phase="done", item=info.digest))
        return self._disk.with_names(info)
