"""Images and volumes of a home, as the caller sees them."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import anyio

from hutch.core import ids
from hutch.errors import InvalidArgumentError, InvalidStateError, NotFoundError
from hutch.image.logins import Logins, make
from hutch.runtime.checks import check_name, check_path, quoted
from hutch.runtime.home import new_id
from hutch.state import VolumeRecord
from hutch.types import VolumeInfo

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hutch.image.logins import Entry
    from hutch.runtime.runtime import LocalRuntime
    from hutch.types import BoxSpec, ImageInfo, LoginInfo, Progress


class LocalImages:
    """The images of one home. Implements `hutch.sdk.base.Images`."""

    def __init__(self, runtime: LocalRuntime) -> None:
        self._store = runtime.image_store
        self._logins = Logins(runtime.home.logins)
        self._records = runtime.store

    async def pull(
        self,
        reference: str,
        *,
        platform: str | None = None,
        always: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> ImageInfo:
        """Fetch an image from its registry. Raises `ImageError`."""
        return await self._store.pull(
            check_name("the image", reference), platform=platform, always=always, progress=progress
        )

    async def load(
        self,
        path: str | Path,
        *,
        reference: str | None = None,
        platform: str | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Sequence[ImageInfo]:
        """Read images from an OCI layout or archive, a `docker save` archive, or a root file system. Raises
        `ImageError`."""
        if reference is not None:
            check_name("the reference", reference)
        return await self._store.load(
            check_path("the image", path), reference=reference, platform=platform, progress=progress
        )

    async def bootstrap(
        self,
        flavour: str = "debian",
        *,
        reference: str | None = None,
        packages: Sequence[str] = (),
        progress: Callable[[Progress], None] | None = None,
    ) -> ImageInfo:
        """Assemble an image from the machine's Debian mirror, without a registry."""
        return await self._store.bootstrap(
            flavour=flavour,
            reference=reference or f"hutch/{flavour}:latest",
            packages=packages,
            progress=progress,
        )

    async def get(self, reference: str) -> ImageInfo:
        """Find a local image. Raises `NotFoundError`."""
        return self._store.get(check_name("the image", reference))

    async def list(self) -> list[ImageInfo]:
        """List the local images."""
        return self._store.list()

    async def tag(self, reference: str, name: str) -> ImageInfo:
        """Give an image another name; one that has that name loses it. Raises `NotFoundError`."""
        return await self._store.tag(check_name("the image", reference), check_name("the name", name))

    async def login(self, registry: str, username: str, password: str, *, prefix: str = "") -> LoginInfo:
        """Keep a login, for pulls from a registry (and below a prefix of repositories). Raises `AlreadyExistsError`."""
        return await self._logins.add(make(registry, username, password, prefix))

    async def logins(self) -> builtins.list[LoginInfo]:
        """List the logins that are kept, without their passwords."""
        return [entry.info for entry in self._logins.entries()]

    async def logout(self, login_id: str) -> None:
        """Forget a login. Raises `NotFoundError`."""
        await self._logins.remove(login_id)

    async def set_logins(self, entries: Sequence[Entry]) -> None:
        """Replace all logins: what a server does that keeps those of all its runners."""
        await self._logins.replace(entries)

    async def obtain(self, spec: BoxSpec, pull: str, progress: Callable[[Progress], None] | None) -> ImageInfo:
        """Return the image of a new box; fetch it if ``pull`` (missing, always, never) wants that."""
        if pull not in ("missing", "always", "never"):
            raise InvalidArgumentError(f"pull {quoted(pull)} is not one of missing, always, never")
        if pull == "never":
            return self._store.get(spec.image)
        if pull == "missing":
            with contextlib.suppress(NotFoundError):
                return self._store.get(spec.image)
        return await self._store.pull(spec.image, platform=spec.platform, always=pull == "always", progress=progress)

    async def remove(self, reference: str) -> Sequence[str]:
        """Remove a reference, and the image with its last one. Raises `InvalidStateError` while a box needs it."""
        return await self._store.remove(check_name("the image", reference), in_use=self._in_use())

    async def prune(self, *, all: bool = False) -> int:
        """Delete images without a reference (``all``: that no box uses) and their layers; returns the bytes freed."""
        return await self._store.prune(in_use=self._in_use(), all=all)

    def _in_use(self) -> set[str]:
        return {record.image_digest for record in self._records.list_boxes() if record.image_digest}


class LocalVolumes:
    """The managed volumes of one home. Implements `hutch.sdk.base.Volumes`."""

    def __init__(self, runtime: LocalRuntime) -> None:
        self._runtime = runtime
        self._store = runtime.store

    async def create(self, name: str) -> VolumeInfo:
        """Make a volume. Raises `AlreadyExistsError`."""
        record = VolumeRecord(id=new_id(), name=ids.check_volume_name(name), created_at=time.time())
        path = self._runtime.home.volume(record.id)
        path.mkdir(mode=0o755)
        try:
            self._store.add_volume(record)
        except BaseException:
            path.rmdir()
            raise
        return _describe(record)

    async def list(self) -> list[VolumeInfo]:
        """List the volumes, oldest first."""
        return [_describe(record) for record in self._store.list_volumes()]

    async def get(self, name: str) -> VolumeInfo:
        """Find a volume by name. Raises `NotFoundError`."""
        return _describe(self._find(name))

    async def remove(self, name: str) -> None:
        """Remove a volume and its files. Raises `InvalidStateError` while a box names it."""
        record = self._find(name)
        users = [
            box.spec.name or box.id
            for box in self._store.list_boxes()
            if any(mount.volume == name for mount in box.spec.mounts)
        ]
        if users:
            raise InvalidStateError(f"volume {name!r} is used by {', '.join(users[:5])}; remove the boxes first")
        self._store.remove_volume(record.id)
        with anyio.CancelScope(shield=True):
            await self._runtime.engines.container.remove_tree(self._runtime.home.volume(record.id))

    def _find(self, name: str) -> VolumeRecord:
        record = self._store.get_volume(check_name("the name of a volume", name))
        if record is None:
            raise NotFoundError(f"volume {quoted(name)} does not exist")
        return record


def _describe(record: VolumeRecord) -> VolumeInfo:
    return VolumeInfo(id=record.id, name=record.name, created_at=record.created_at)
