"""Files of boxes, as tar streams."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import StreamingResponse

from hutch.errors import InvalidArgumentError
from hutch.server.doors import tar_files
from hutch.server.http import ERRORS, Segment, ServiceDep

router = APIRouter(prefix="/v1/boxes/{box_id}", tags=["files"], responses=ERRORS)

SOURCE_IS_DIR = "X-Boxlite-Source-Is-Dir"
_TAR = "application/x-tar"

BoxPath = Annotated[str, Query(max_length=4096, description="absolute, or relative to the working directory")]


@router.put(
    "/files",
    status_code=204,
    openapi_extra={
        "requestBody": {"required": True, "content": {_TAR: {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def put_files(
    request: Request,
    box_id: Segment,
    service: ServiceDep,
    path: BoxPath,
    source_is_dir: Literal["true", "false"] = "true",
) -> Response:
    """Unpack a tar in the box. With `source_is_dir`, below the folder `path`, which is made; otherwise its one entry
    becomes `path`, or goes into it where that is a folder or ends in a slash."""
    if not path:
        raise InvalidArgumentError("path: it is empty")
    box = await service.box_for_use(box_id)
    await tar_files(box).put_tar(request.stream(), path, is_directory=source_is_dir == "true")
    service.touch(box.id)
    return Response(status_code=204)


@router.get(
    "/files",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {_TAR: {}},
            "description": "A tar, uncompressed, whose first entry is the file or folder",
            "headers": {SOURCE_IS_DIR: {"schema": {"type": "string"}}},
        }
    },
)
async def get_files(box_id: Segment, service: ServiceDep, path: BoxPath) -> StreamingResponse:
    """Get a file or folder of the box as a tar. When it fails on the way the connection is cut."""
    if not path:
        raise InvalidArgumentError("path: it is empty")
    box = await service.box_for_use(box_id)
    is_directory = (await box.files.stat(path)).type == "directory"
    return StreamingResponse(
        tar_files(box).get_tar(path), media_type=_TAR, headers={SOURCE_IS_DIR: "true" if is_directory else "false"}
    )
