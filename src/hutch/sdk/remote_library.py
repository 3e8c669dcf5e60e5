"""Images and volumes of a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio.to_thread

from hutch.core import ids
from hutch.errors import InvalidArgumentError, NotFoundError
from hutch.runtime.checks import check_name, check_path
from hutch.sdk.remote_wire import BootstrapBody, LoginBody, NameBody, PruneBody, PullBody, TagBody
from hutch.types import ImageInfo, LoginInfo, VolumeInfo

if TYPE_CHECKING:
    import builtins
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from hutch.image.logins import Entry
    from hutch.sdk.remote_http import Http
    from hutch.types import Progress

_PIECE = 1 << 20


class RemoteImages:
    """The images of a server. Implements `hutch.sdk.base.Images`."""

    def __init__(self, http: Http) -> None:
        self._http = http

    async def pull(
        self,
        reference: str,
        *,
        platform: str | None = None,
        always: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> ImageInfo:
        """Let the server fetch an image from its registry. Raises `ImageError`."""
        body = PullBody(reference=check_name("the image", reference), platform=platform, always=always)
        return await self._http.call("POST", "/v1/x/images/pull", ImageInfo, body, progress=progress)

    async def load(
        self,
        path: str | Path,
        *,
        reference: str | None = None,
        platform: str | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Sequence[ImageInfo]:
        """Send an image archive to the server. Raises `ImageError`."""
        source = check_path("the image", path)
        if source.is_dir():
            raise InvalidArgumentError(f"{source} is a folder; a server takes image archives (make a tar file of it)")
        return await self._http.call(
            "POST",
            "/v1/x/images/load",
            list[ImageInfo],
            query={"reference": reference, "platform": platform},
            content=pieces(source),
            progress=progress,
        )

    async def bootstrap(
        self,
        flavour: str = "debian",
        *,
        reference: str | None = None,
        packages: Sequence[str] = (),
        progress: Callable[[Progress], None] | None = None,
    ) -> ImageInfo:
        """Let the server assemble an image from its Debian mirror."""
        body = BootstrapBody(flavour=flavour, reference=reference, packages=tuple(packages))
        return await self._http.call("POST", "/v1/x/images/bootstrap", ImageInfo, body, progress=progress)

    async def get(self, reference: str) -> ImageInfo:
        """Find an image. Raises `NotFoundError`."""
        return await self._http.get("/v1/x/image", ImageInfo, reference=check_name("the image", reference))

    async def list(self) -> list[ImageInfo]:
        """List the images."""
        return await self._http.get("/v1/x/images", list[ImageInfo])

    async def tag(self, reference: str, name: str) -> ImageInfo:
        """Give an image another name; one that has that name loses it. Raises `NotFoundError`."""
        body = TagBody(reference=check_name("the image", reference), name=check_name("the name", name))
        return await self._http.call("POST", "/v1/x/images/tag", ImageInfo, body)

    async def login(self, registry: str, username: str, password: str, *, prefix: str = "") -> LoginInfo:
        """Let the server keep a login for its pulls. Raises `AlreadyExistsError`."""
        body = LoginBody(registry=registry, username=username, password=password, prefix=prefix)
        return await self._http.call("POST", "/v1/x/logins", LoginInfo, body)

    async def logins(self) -> builtins.list[LoginInfo]:
        """List the logins that the server keeps, without their passwords."""
        return await self._http.get("/v1/x/logins", list[LoginInfo])

    async def logout(self, login_id: str) -> None:
        """Let the server forget a login. Raises `NotFoundError`."""
        await self._http.call("DELETE", "/v1/x/login", object, query={"id": check_name("the login", login_id)})

    async def set_logins(self, entries: Sequence[Entry]) -> None:
        """Replace all logins of a runner, which is what an API does."""
        await self._http.call("PUT", "/v1/x/logins", object, entries)

    async def remove(self, reference: str) -> Sequence[str]:
        """Remove a reference, and the image with its last one. Raises `InvalidStateError` while a box needs it."""
        query = {"reference": check_name("the image", reference)}
        return await self._http.call("DELETE", "/v1/x/image", list[str], query=query)

    async def prune(self, *, all: bool = False) -> int:
        """Delete images without a reference (``all``: that no box uses); returns the bytes freed."""
        return await self._http.call("POST", "/v1/x/images/prune", int, PruneBody(all=all))


class RemoteVolumes:
    """The managed volumes of a server. Implements `hutch.sdk.base.Volumes`."""

    def __init__(self, http: Http) -> None:
        self._http = http

    async def create(self, name: str) -> VolumeInfo:
        """Make a volume. Raises `AlreadyExistsError`."""
        body = NameBody(name=ids.check_volume_name(name))
        return await self._http.call("POST", "/v1/x/volumes", VolumeInfo, body)

    async def list(self) -> list[VolumeInfo]:
        """List the volumes, oldest first."""
        return await self._http.get("/v1/x/volumes", list[VolumeInfo])

    async def get(self, name: str) -> VolumeInfo:
        """Find a volume by name. Raises `NotFoundError`."""
        return await self._http.get("/v1/x/volume", VolumeInfo, name=check_name("the name of a volume", name))

    async def remove(self, name: str) -> None:
        """Remove a volume and its files. Raises `InvalidStateError` while a box names it."""
        query = {"name": check_name("the name of a volume", name)}
        await self._http.call("DELETE", "/v1/x/volume", object, query=query)


async def pieces(path: Path) -> AsyncIterator[bytes]:
    """Read a file piece by piece. Raises `NotFoundError` before the first."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        while piece := await anyio.to_thread.run_sync(file.read, _PIECE):
            yield piece
