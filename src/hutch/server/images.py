"""Images, their aliases, and logins at registries."""

from __future__ import annotations

from fastapi import APIRouter, Response

from hutch.errors import NotFoundError, UnsupportedError
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
    """Find an image by name or digest; a slash in the name is sent as `%2F`."""
    return views.image(name, await service.backend.images.get(name))


@router.delete("/{name}", status_code=204)
async def remove_image(name: Segment, service: ServiceDep) -> Response:
    """Remove a name, and the image with its last one."""
    await service.backend.images.remove(name)
    return Response(status_code=204)


@router.post("/{name}/aliases", status_code=201)
async def create_alias(name: Segment, body: AliasRequest, service: ServiceDep) -> ImageDetail:
    """Give a version of an image another tag. Supported only where it has that tag already."""
    info = await service.backend.images.get(name)
    detail = views.image(name, info)
    if body.digest not in (info.digest, info.manifest_digest):
        raise NotFoundError(f"image {name!r:.100} has no version {body.digest}")
    if body.alias not in detail.aliases:
        raise UnsupportedError("aliases: this server cannot give an image another tag yet; pull it under that tag")
    return detail


@router.delete("/{name}/aliases/{alias}", status_code=204)
async def remove_alias(name: Segment, alias: Segment, service: ServiceDep) -> Response:
    """Remove a tag of an image, and the image with its last one."""
    info = await service.backend.images.get(name)
    for reference in info.references:
        if views.split_reference(reference)[1] == alias:
            await service.backend.images.remove(reference)
            return Response(status_code=204)
    raise NotFoundError(f"image {name!r:.100} has no alias {alias!r:.100}")
