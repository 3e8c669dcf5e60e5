"""Images, their aliases, and logins at registries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from hutch.core import ociref
from hutch.errors import NotFoundError
from hutch.server import views
from hutch.server.http import ERRORS, PageDep, Segment, ServiceDep
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
async def list_images(service: ServiceDep, page: PageDep) -> ImageList:
    """List the names of the images that are here, the newest images first."""
    rows = [(info, row) for info in await service.backend.images.list() for row in views.image_rows(info)]
    found = page.of(rows, lambda pair: (-pair[0].created_at, f"{pair[1].reference} {pair[1].id}"))
    return ImageList(images=[row for _, row in found], next_page_token=page.next_token)


@router.get("/usage")
async def image_usage(service: ServiceDep) -> ImageUsage:
    """What the images take."""
    infos = await service.backend.images.list()
    return ImageUsage(count=len(infos), limit=0, known_bytes=sum(info.size for info in infos))


@router.get("/registries")
async def list_registries(service: ServiceDep, page: PageDep) -> RegistryList:
    """List the logins at registries, without their passwords, oldest first."""
    infos = page.of(await service.backend.images.logins(), lambda info: (info.created_at, info.id))
    return RegistryList(registries=[views.registry(info) for info in infos], next_page_token=page.next_token)


@router.post("/registries", status_code=201)
async def create_registry(body: RegistryRequest, service: ServiceDep) -> RegistryView:
    """Keep a login, which pulls from that registry use; of several that fit, the one with the longest prefix."""
    made = await service.backend.images.login(
        body.registry_host, body.username, body.password, prefix=body.repository_prefix
    )
    return views.registry(made)


@router.delete("/registries/{registry_id}", status_code=204)
async def remove_registry(registry_id: Segment, service: ServiceDep) -> Response:
    """Forget a login."""
    await service.backend.images.logout(registry_id)
    return Response(status_code=204)


@router.get("/{name}")
async def get_image(name: Segment, service: ServiceDep) -> ImageDetail:
    """Find an image by its name (with all its tags), a full reference or a digest; a slash is sent as `%2F`."""
    return _detail(service, name, await _versions(service, name))


@router.delete("/{name}", status_code=204)
async def remove_image(name: Segment, service: ServiceDep) -> Response:
    """Remove an image: all tags of a name, or what a full reference or a digest means."""
    tags = [
        reference
        for info in await service.backend.images.list()
        for reference in info.references
        if views.repository_of(reference) == views.repository_of(name) and _bare(name)
    ]
    for reference in tags or [name]:
        await service.backend.images.remove(reference)
    return Response(status_code=204)


@router.post("/{name}/aliases", status_code=201)
async def create_alias(request: Request, name: Segment, body: AliasRequest, service: ServiceDep) -> ImageDetail:
    """Give a stored image another tag of this name. An image that had it loses it; where it had no other, it stays
    under its digest until images without a name are removed."""
    await _versions(service, name)
    repository = views.repository_of(name)
    target = f"{repository}:{body.alias}"
    ociref.parse(target)
    before = chosen = None
    for info in await service.backend.images.list():
        if body.digest in (info.digest, info.manifest_digest):
            chosen = info
        if any(_same(reference, target) for reference in info.references):
            before = info
    if chosen is None:
        raise NotFoundError(f"image {name!r:.100} has no version {body.digest}")
    if before is None or before.digest != chosen.digest:
        await service.backend.images.tag(chosen.digest, target)
        actor = f"key:{request.scope['hutch.principal']}"
        was = None if before is None else before.digest
        service.marks.aliases.add(repository, body.alias, was, chosen.digest, actor)
    return _detail(service, name, await _versions(service, name))


@router.delete("/{name}/aliases/{alias}", status_code=204)
async def remove_alias(name: Segment, alias: Segment, service: ServiceDep) -> Response:
    """Remove a tag of an image, and the image with its last one."""
    target = f"{views.repository_of(name)}:{alias}"
    for reference in (reference for info in await _versions(service, name) for reference in info.references):
        if _same(reference, target):
            await service.backend.images.remove(reference)
            return Response(status_code=204)
    raise NotFoundError(f"image {name!r:.100} has no alias {alias!r:.100}")


def _detail(service: Service, name: str, infos: list[ImageInfo]) -> ImageDetail:
    repository = views.repository_of(name if _bare(name) or not infos[0].references else infos[0].references[0])
    return views.image(name, infos, service.marks.aliases.of(repository), repository=repository)


async def _versions(service: Service, name: str) -> list[ImageInfo]:
    """The images that have the name with any tag; else the one that it means as a reference. Raises `NotFoundError`."""
    if _bare(name):
        found = [
            info
            for info in await service.backend.images.list()
            if any(views.repository_of(reference) == views.repository_of(name) for reference in info.references)
        ]
        if found:
            return found
    return [await service.backend.images.get(name)]


def _bare(name: str) -> bool:
    return "@" not in name and ":" not in name.rpartition("/")[2]


def _same(one: str, other: str) -> bool:
    return ociref.parse(one) == ociref.parse(other)
