"""What the route modules share: types of parameters, and the errors that every operation documents."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Depends, Path, Query
from pydantic import AfterValidator

from hutch.server.models import ErrorResponse
from hutch.server.paging import Page
from hutch.server.service import Service, service_of

# The path is matched undecoded, so that a name may hold a slash.
Segment = Annotated[str, Path(min_length=1, max_length=1024), AfterValidator(unquote)]
Flag = Annotated[bool, Query()]
PageDep = Annotated[Page, Depends()]
ServiceDep = Annotated[Service, Depends(service_of)]

_TEXTS = {
    400: "A value is malformed, out of range or unknown, or this server does not support it",
    401: "No key, or an unknown one",
    403: "The key does not allow it",
    404: "The thing does not exist",
    408: "The body did not come in time",
    409: "The name is taken, or the state of the thing does not allow it",
    410: "The execution ended long ago and its log was released",
    413: "The body is too large",
    422: "The command cannot be started, the image cannot be had, or a key was used for another request",
    429: "A limit is reached",
    500: "The server failed",
    503: "The engine, the box or the network does not answer",
    504: "It took too long",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in _TEXTS.items()
}
