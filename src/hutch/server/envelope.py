"""Errors on the wire: ``{"error": {"message", "type", "code", "request_id"}}``, whatever went wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hutch.errors import (
    DeadlineError,
    HutchError,
    InternalError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from hutch.sdk.remote_wire import dumps, error_details

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastapi import FastAPI
    from starlette.requests import Request

REQUEST_ID = "x-request-id"

# What stands in `type`; only people read it.
_TYPES = {"unauthenticated": "AuthError", "permission_denied": "PermissionError", "execution_failed": "ExecutionError"}
# The error that a bare HTTP status stands for.
_BY_STATUS: dict[int, type[HutchError]] = {
    401: UnauthenticatedError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: InvalidStateError,
    413: ResourceExhaustedError,
}


class PayloadTooLargeError(ResourceExhaustedError):
    """A body or a header is larger than the server takes."""

    status = 413


class SlowClientError(DeadlineError):
    """A body did not come in time."""

    status = 408


class KeyReusedError(InvalidArgumentError):
    """An Idempotency-Key came again with another request."""

    status = 422


def body_of(error: HutchError, request_id: str, *, details: bool = False) -> dict[str, Any]:
    """The envelope; with ``details``: all that our own SDK needs to raise the same error."""
    body = {
        "message": error.message or type(error).__name__,
        "type": _TYPES.get(error.code, _public_name(type(error))),
        "code": error.code,
        "request_id": request_id,
    }
    return {"error": {**body, **(error_details(error) if details else {})}}


def envelope(
    error: HutchError,
    request_id: str,
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
    details: bool = False,
) -> Response:
    """Return the response that tells of an error. See `body_of`."""
    return Response(
        dumps(body_of(error, request_id, details=details)),
        status_code=status or error.status,
        headers={REQUEST_ID: request_id, **_extra_headers(error), **(headers or {})},
        media_type="application/json",
    )


def install(app: FastAPI) -> None:
    """Answer every error of the application with the envelope."""

    async def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HutchError)
        return envelope(error, request_id(request.scope))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = _BY_STATUS.get(error.status_code, InvalidArgumentError if error.status_code < 500 else InternalError)
        text = {
            404: f"there is nothing at {request.method} {request.scope['path']:.200}",
            405: f"{request.scope['path']:.200} does not take {request.method}",
        }.get(error.status_code, str(error.detail))
        return envelope(kind(text), request_id(request.scope), status=error.status_code, headers=error.headers)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return envelope(InvalidArgumentError(_describe(error.errors())), request_id(request.scope))

    async def on_defect(request: Request, error: Exception) -> Response:
        return envelope(
            InternalError("the server failed on this request; its log has the details under the request id"),
            request_id(request.scope),
        )

    app.add_exception_handler(HutchError, on_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_defect)


def request_id(scope: Mapping[str, Any]) -> str:
    """The id of the request, which the edge has given it."""
    return str(scope.get("hutch.request_id", ""))


def _public_name(kind: type[HutchError]) -> str:
    # A class that only carries another status is not part of the tree that people know.
    while kind.__module__ != "hutch.errors":
        kind = kind.__mro__[1]
    return kind.__name__


def _extra_headers(error: HutchError) -> dict[str, str]:
    return {"www-authenticate": "Bearer"} if isinstance(error, UnauthenticatedError) else {}


def _describe(errors: Sequence[Any]) -> str:
    parts = []
    for error in errors[:5]:
        where = [str(step) for step in error["loc"][1:]] or [str(error["loc"][0]) if error["loc"] else "body"]
        text = "unknown field" if error["type"] == "extra_forbidden" else str(error["msg"])
        parts.append(f"{'.'.join(where)[:200]}: {text[:200]}")
    return "; ".join(parts) or "the request is not valid"
