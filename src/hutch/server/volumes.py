"""Managed volumes."""

from __future__ import annotations

import secrets

from fastapi import APIRouter, Response

from hutch.server import views
from hutch.server.boxes import find_volume
from hutch.server.http import ERRORS, Flag, PageDep, Segment, ServiceDep
from hutch.server.models import VolumeList, VolumeRequest, VolumeView

router = APIRouter(prefix="/v1/volumes", tags=["volumes"], responses=ERRORS)


@router.post("", status_code=201)
async def create_volume(service: ServiceDep, body: VolumeRequest | None = None) -> VolumeView:
    """Make a volume; without a name it gets one."""
    name = body.name if body is not None and body.name is not None else f"volume-{secrets.token_hex(6)}"
    return views.volume(await service.backend.volumes.create(name))


@router.get("")
async def list_volumes(service: ServiceDep, page: PageDep) -> VolumeList:
    """List the volumes, oldest first."""
    infos = page.of(await service.backend.volumes.list(), lambda info: (info.created_at, info.id))
    return VolumeList(volumes=[views.volume(info) for info in infos], next_page_token=page.next_token)


@router.get("/{volume_id}")
async def get_volume(volume_id: Segment, service: ServiceDep) -> VolumeView:
    """Find a volume by id or name."""
    return views.volume(await service.backend.volumes.get(await find_volume(service, volume_id)))


@router.delete("/{volume_id}", status_code=204)
async def remove_volume(volume_id: Segment, service: ServiceDep, force: Flag = False) -> Response:
    """Remove a volume and its files. While a box names it that is refused, also with `force`."""
    await service.backend.volumes.remove(await find_volume(service, volume_id))
    return Response(status_code=204)
