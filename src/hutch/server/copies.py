"""Snapshots, clones, export and import of boxes."""

from __future__ import annotations

import contextlib
from typing import Annotated

import anyio
from fastapi import APIRouter, Query, Request, Response
from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from hutch.core import ids
from hutch.server import views
from hutch.server.http import ERRORS, PageDep, Segment, ServiceDep
from hutch.server.models import (
    BoxView,
    CloneRequest,
    ExportRequest,
    SnapshotList,
    SnapshotRequest,
    SnapshotView,
)

router = APIRouter(prefix="/v1/boxes", tags=["copies"], responses=ERRORS)


@router.post("/{box_id}/snapshots", status_code=201)
async def create_snapshot(box_id: Segment, body: SnapshotRequest, service: ServiceDep) -> SnapshotView:
    """Save the disk of a box. One that runs is frozen for the moment."""
    box = await service.box(box_id)
    return views.snapshot(await box.snapshots.create(body.name))


@router.get("/{box_id}/snapshots")
async def list_snapshots(box_id: Segment, service: ServiceDep, page: PageDep) -> SnapshotList:
    """List the snapshots of a box, oldest first."""
    box = await service.box(box_id)
    infos = page.of(await box.snapshots.list(), lambda info: (info.created_at, info.id))
    return SnapshotList(snapshots=[views.snapshot(info) for info in infos], next_page_token=page.next_token)


@router.get("/{box_id}/snapshots/{name}")
async def get_snapshot(box_id: Segment, name: Segment, service: ServiceDep) -> SnapshotView:
    """Find a snapshot."""
    box = await service.box(box_id)
    return views.snapshot(await box.snapshots.get(name))


@router.delete("/{box_id}/snapshots/{name}", status_code=204)
async def remove_snapshot(box_id: Segment, name: Segment, service: ServiceDep) -> Response:
    """Remove a snapshot."""
    box = await service.box(box_id)
    await box.snapshots.remove(name)
    return Response(status_code=204)


@router.post("/{box_id}/snapshots/{name}/restore", status_code=204)
async def restore_snapshot(box_id: Segment, name: Segment, service: ServiceDep) -> Response:
    """Take the disk of a box back to a snapshot. The box must not run."""
    box = await service.box(box_id)
    await box.snapshots.restore(name)
    return Response(status_code=204)


@router.post("/{box_id}/clone", status_code=201)
async def clone_box(box_id: Segment, service: ServiceDep, body: CloneRequest | None = None) -> BoxView:
    """Make a box with a copy of this one's disk and configuration. It does not run."""
    box = await service.box(box_id)
    clone = await box.clone(body.name if body else None)
    service.counters.created += 1
    service.touch(clone.id)
    return views.box(service, await clone.info())


@router.post(
    "/{box_id}/export",
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {}}, "description": "The archive"}},
)
async def export_box(box_id: Segment, service: ServiceDep, body: ExportRequest | None = None) -> FileResponse:
    """Get the box (disk, configuration, image) as one archive."""
    box = await service.box(box_id)
    service.touch(box.id)
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(service.transit.place())
        await box.export(path)
        kept = stack.pop_all()
    return FileResponse(path, media_type="application/octet-stream", background=BackgroundTask(kept.close))


@router.post(
    "/import",
    status_code=201,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def import_box(
    request: Request, service: ServiceDep, name: Annotated[str | None, Query(max_length=128)] = None
) -> BoxView:
    """Make a box from an archive. The archive is not trusted."""
    if name is not None:
        ids.check_name(name)
    with service.transit.place() as path:
        async with await anyio.open_file(path, "wb") as file:
            async for piece in request.stream():
                await file.write(piece)
        box = await service.backend.import_box(path, name=name)
    await box.detach()
    service.counters.created += 1
    service.touch(box.id)
    return views.box(service, await box.info())
