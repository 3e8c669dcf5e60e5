"""The OpenAPI document: what FastAPI knows, and beside it ``/v1/x`` and the sockets, which it does not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi.openapi.utils import get_openapi

from hutch.sdk.remote_http import STREAM_TYPE
from hutch.server.answers import Endpoint
from hutch.server.http import ERRORS

if TYPE_CHECKING:
    from fastapi import FastAPI

_REFERENCE = "#/components/schemas/{name}"
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_ERROR = {"application/json": {"schema": {"$ref": _REFERENCE.format(name="ErrorResponse")}}}


def install(app: FastAPI) -> None:
    """Let the application serve a document that describes all of its routes."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    endpoints = [route for route in app.routes if isinstance(route, Endpoint)]
    kinds = [kind for endpoint in endpoints for kind in (endpoint.takes, endpoint.gives) if kind is not None]
    schemas, components = msgspec.json.schema_components(kinds, schema_hook=lambda kind: {}, ref_template=_REFERENCE)
    schema_of = dict(zip(map(repr, kinds), schemas, strict=True))
    for endpoint in endpoints:
        operation = _operation(endpoint, schema_of)
        document["paths"].setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    document["components"]["schemas"].update(components)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    return document


def _operation(endpoint: Endpoint, schema_of: dict[str, Any]) -> dict[str, Any]:
    parameters = [_parameter(name, "path", required=True) for name in re.findall(r"{(\w+)}", endpoint.path)]
    parameters += [_parameter(name.rstrip("?"), "query", required=name[-1] != "?") for name in endpoint.query]
    content: dict[str, Any] = _BINARY
    if endpoint.gives is not None:
        content = {
            "application/json": {"schema": schema_of[repr(endpoint.gives)]},
            STREAM_TYPE: {
                "schema": {"type": "string", "description": "of an answer that takes long: a line of JSON each"}
            },
        }
    operation: dict[str, Any] = {
        "tags": ["sdk"],
        "summary": endpoint.summary,
        "operationId": re.sub("[^a-z]+", "_", f"{endpoint.method} {endpoint.path}".lower()).rstrip("_"),
        "parameters": parameters,
        "responses": {
            "200": {"description": "Done", "content": content},
            **{
                str(status): {"description": error["description"], "content": _ERROR}
                for status, error in ERRORS.items()
            },
        },
    }
    if endpoint.upload:
        operation["requestBody"] = {"required": True, "content": _BINARY}
    elif endpoint.takes is not None:
        operation["requestBody"] = {"content": {"application/json": {"schema": schema_of[repr(endpoint.takes)]}}}
    return operation


def _parameter(name: str, place: str, *, required: bool) -> dict[str, Any]:
    return {"name": name, "in": place, "required": required, "schema": {"type": "string"}}
