"""Images, their aliases, and logins at registries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Response

from hutch.core import ociref
from hutch.errors import InvalidArgumentError, NotFoundError, UnsupportedError
from hutch.server import views
from hutch.server.http import ERRORS, Segment, ServiceDep
from hutch.server.models import (
    AliasRequest,
    ImageDetail,
    ImageList,
    ImageUsage,
    RegistryList,
    RegistryRequest,
    RegistryView,
)

if TYPE_CHECKING:
    from hutch.server.service import Service
    from hutch.types import ImageInfo

router = APIRouter(prefix="/v1/images", tags=["images"], responses=ERRORS)


@router.get("")
async def list_images(service: ServiceDep) -> ImageList:
    """List the images that are here."""
    return ImageList(images=[row for info in await service.backend.images.list() for row in views.image_rows(info)])


@router.get("/usage")
async def image_usage(service: ServiceDep) -> ImageUsage:
    """What the images take."""
    infos = await service.backend.images.list()
    return ImageUsage(count=len(infos), limit=0, known_bytes=sum(info.size for info in infos))


@router.get("/registries")
async def list_registries(service: ServiceDep) -> RegistryList:
    """List the logins at registries: this server uses those of its machine (`~/.docker/config.json`) only."""
    return RegistryList(registries=[])


@router.post("/registries", status_code=201)
async def create_registry(body: RegistryRequest, service: ServiceDep) -> RegistryView:
    """Not supported yet: logins are those of the server's machine."""
    raise UnsupportedError(
        "registries: this server takes no logins; log in on its machine (`docker login` or ~/.docker/config.json)"
    )


@router.delete("/registries/{registry_id}", status_code=204)
async def remove_registry(registry_id: Segment, service: ServiceDep) -> Response:
    """Remove a login."""
    raise NotFoundError(f"registry {registry_id!r:.100} does not exist")


@router.get("/{name}")
async def get_image(name: Segment, service: ServiceDep) -> ImageDetail:
    """Find an image by its name (with all its tags), a full reference or a digest; a slash is sent as `%2F`."""
    return views.image(name, await _versions(service, name))


@router.delete("/{name}", status_code=204)
async def remove_image(name: Segment, service: ServiceDep) -> Response:
    """Remove an image: all tags of a name, or what a full reference or a digest means."""
    tags = [
        reference
        for info in await service.backend.images.list()
        for reference in info.references
        if _repository(reference) == _repository(name) and _bare(name)
    ]
    for reference in tags or [name]:
        await service.backend.images.remove(reference)
    return Response(status_code=204)


@router.post("/{name}/aliases", status_code=201)
async def create_alias(name: Segment, body: AliasRequest, service: ServiceDep) -> ImageDetail:
    """Give a version of an image another tag. Supported only where it has that tag already."""
    infos = await _versions(service, name)
    chosen = [info for info in infos if body.digest in (info.digest, info.manifest_digest)]
    if not chosen:
        raise NotFoundError(f"image {name!r:.100} has no version {body.digest}")
    if body.alias not in views.image(name, chosen).aliases:
        raise UnsupportedError("aliases: this server cannot give an image another tag yet; pull it under that tag")
    return views.image(name, infos)


@router.delete("/{name}/aliases/{alias}", status_code=204)
async def remove_alias(name: Segment, alias: Segment, service: ServiceDep) -> Response:
    """Remove a tag of an image, and the image with its last one."""
    for reference in (reference for info in await _versions(service, name) for reference in info.references):
        if views.split_reference(reference)[1] == alias and _repository(reference) == _repository(name):
            await service.backend.images.remove(reference)
            return Response(status_code=204)
    raise NotFoundError(f"image {name!r:.100} has no alias {alias!r:.100}")


async def _versions(service: Service, name: str) -> list[ImageInfo]:
    """The images that have the name with any tag; else the one that it means as a reference. Raises `NotFoundError`."""
    if _bare(name):
        found = [
            info
            for info in await service.backend.images.list()
            if any(_repository(reference) == _repository(name) for reference in info.references)
        ]
        if found:
            return found
    return [await service.backend.images.get(name)]


def _bare(name: str) -> bool:
    return "@" not in name and ":" not in name.rpartition("/")[2]


def _repository(reference: str) -> str:
    try:
        parsed = ociref.parse(reference)
    except InvalidArgumentError:
        return reference
    return f"{parsed.domain}/{parsed.path}"
