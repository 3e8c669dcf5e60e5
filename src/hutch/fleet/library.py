"""Images and volumes of a fleet: images are on every runner, a volume is on one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.errors import NotFoundError, UpstreamUnavailableError
from hutch.image.logins import added, make, removed
from hutch.runtime.checks import check_name, quoted

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hutch.fleet.registry import Registry
    from hutch.fleet.runners import Runners
    from hutch.sdk.remote_library import RemoteVolumes
    from hutch.types import ImageInfo, LoginInfo, Progress, VolumeInfo


class FleetImages:
    """Implements `hutch.sdk.base.Images`: what comes, comes to every runner that is there."""

    def __init__(self, runners: Runners, registry: Registry) -> None:
        self._runners = runners
        self._registry = registry

    async def pull(
        self,
        reference: str,
        *,
        platform: str | None = None,
        always: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> ImageInfo:
        """Fetch an image. Raises `ImageError`."""
        infos = [
            await runner.images.pull(reference, platform=platform, always=always, progress=progress)
            for runner in self._runners.alive()
        ]
        return infos[0]

    async def load(
        self,
        path: str | Path,
        *,
        reference: str | None = None,
        platform: str | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Sequence[ImageInfo]:
        """Load an image archive. Raises `ImageError`."""
        infos = [
            await runner.images.load(path, reference=reference, platform=platform, progress=progress)
            for runner in self._runners.alive()
        ]
        return infos[0]

    async def bootstrap(
        self,
        flavour: str = "debian",
        *,
        reference: str | None = None,
        packages: Sequence[str] = (),
        progress: Callable[[Progress], None] | None = None,
    ) -> ImageInfo:
        """Assemble an image from each runner's Debian mirror."""
        infos = [
            await runner.images.bootstrap(flavour, reference=reference, packages=packages, progress=progress)
            for runner in self._runners.alive()
        ]
        return infos[0]

    async def get(self, reference: str) -> ImageInfo:
        """Find an image. Raises `NotFoundError`."""
        for runner in self._runners.alive():
            try:
                return await runner.images.get(reference)
            except NotFoundError:
                continue
        raise NotFoundError(f"image {quoted(reference)} is on no runner; pull it first")

    async def list(self) -> list[ImageInfo]:
        """List the images that any runner has."""
        found: dict[str, ImageInfo] = {}
        for runner in self._runners.alive():
            for image in await runner.images.list():
                found.setdefault(image.digest, image)
        return list(found.values())

    async def remove(self, reference: str) -> Sequence[str]:
        """Remove a reference everywhere. Raises `InvalidStateError` while a box needs it."""
        removed: Sequence[str] | None = None
        for runner in self._runners.alive():
            try:
                removed = await runner.images.remove(reference)
            except NotFoundError:
                continue
        if removed is None:
            raise NotFoundError(f"image {quoted(reference)} is on no runner")
        return removed

    async def tag(self, reference: str, name: str) -> ImageInfo:
        """Give an image another name on every runner that has it. Raises `NotFoundError`."""
        tagged: ImageInfo | None = None
        for runner in self._runners.alive():
            try:
                tagged = await runner.images.tag(reference, name)
            except NotFoundError:
                continue
        if tagged is None:
            raise NotFoundError(f"image {quoted(reference)} is on no runner")
        return tagged

    async def login(self, registry: str, username: str, password: str, *, prefix: str = "") -> LoginInfo:
        """Keep a login for the pulls of all runners. Raises `AlreadyExistsError`."""
        entry = make(registry, username, password, prefix)
        added(self._registry.logins(), entry)
        self._registry.save_login(entry)
        await self._runners.tell_logins()
        return entry.info

    async def logins(self) -> builtins.list[LoginInfo]:
        """List the logins that are kept, without their passwords."""
        return [entry.info for entry in self._registry.logins()]

    async def logout(self, login_id: str) -> None:
        """Forget a login, on all runners. Raises `NotFoundError`."""
        removed(self._registry.logins(), login_id)
        self._registry.remove_login(login_id)
        await self._runners.tell_logins()

    async def prune(self, *, all: bool = False) -> int:
        """Delete what no box uses; returns the bytes freed on all runners."""
        return sum([await runner.images.prune(all=all) for runner in self._runners.alive()])


class FleetVolumes:
    """Implements `hutch.sdk.base.Volumes`."""

    def __init__(self, runners: Runners, registry: Registry) -> None:
        self._runners = runners
        self._registry = registry

    async def create(self, name: str) -> VolumeInfo:
        """Make a volume on the runner with the fewest running boxes. Raises `AlreadyExistsError`."""
        runner = self._runners.alive()[0]
        self._registry.save_volume(name, runner.id)
        try:
            return await runner.volumes.create(name)
        except BaseException as error:
            if not isinstance(error, UpstreamUnavailableError):  # otherwise it may be there
                self._registry.remove_volume(name)
            raise

    async def list(self) -> list[VolumeInfo]:
        """List the volumes of the runners that are there."""
        ours = self._registry.volumes()
        found: list[VolumeInfo] = []
        for runner in self._runners.alive():
            found += [volume for volume in await runner.volumes.list() if ours.get(volume.name) == runner.id]
        return sorted(found, key=lambda volume: volume.created_at)

    async def get(self, name: str) -> VolumeInfo:
        """Find a volume by name. Raises `NotFoundError`."""
        return await self._home(name).get(name)

    async def remove(self, name: str) -> None:
        """Remove a volume and its files. Raises `InvalidStateError` while a box names it."""
        await self._home(name).remove(name)
        self._registry.remove_volume(name)

    def _home(self, name: str) -> RemoteVolumes:
        runner = self._registry.volumes().get(check_name("the name of a volume", name))
        if runner is None:
            raise NotFoundError(f"volume {quoted(name)} does not exist")
        return self._runners.get(runner).volumes
