"""What every request passes first: its id, its path, the right to make it, the size of its body."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from typing import TYPE_CHECKING
from urllib.parse import quote

from hutch.errors import HutchError, NotFoundError, PermissionDeniedError, UnauthenticatedError
from hutch.server.body import Body
from hutch.server.envelope import REQUEST_ID, PayloadTooLargeError, envelope

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from hutch.server.settings import ServerSettings

# Anyone may ask for these: they tell nothing about boxes.
_PUBLIC = frozenset({"/health", "/v1/health", "/v1/config", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
# Never under the prefix.
_UNPREFIXED = frozenset({"/v1/config", "/v1/me", "/v1/health"})
# These read their body as a stream, with a limit of their own.
_STREAMED = re.compile(r"/v1/(boxes/(import|[^/]+/files)|x/boxes/import|x/images/load)\Z")
_GIVEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class Edge:
    """ASGI middleware. Puts ``hutch.request_id`` and ``hutch.principal`` into the scope.

    The path is matched as it was sent: a ``%2F`` in a name does not separate, and handlers decode what they take.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._full = [_digest(key.encode()) for key in settings.api_keys]
        self._reading = [_digest(key.encode()) for key in settings.read_only_keys]
        prefix = settings.path_prefix.strip("/")
        self._prefix = f"/v1/{prefix}/" if prefix else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        number = headers.get(REQUEST_ID.encode(), b"").decode("latin-1")
        if not _GIVEN_ID.match(number):
            number = secrets.token_hex(8)
        # In place: also the outermost handler of errors tells the id.
        scope.update({"path": _path(scope), "root_path": "", "hutch.request_id": number})
        try:
            self._strip_prefix(scope)
            self._authorise(scope, headers)
            body = self._body(scope, receive, headers) if scope["type"] == "http" else None
        except HutchError as error:
            await envelope(error, number)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, body.receive, body.answering(scope, _with_id(send, number), number))
        else:
            await self._app(scope, receive, _refusing(scope, receive, send, number))

    def _strip_prefix(self, scope: Scope) -> None:
        path = scope["path"]
        if not self._prefix or not path.startswith("/v1/") or path in _UNPREFIXED:
            return
        if not path.startswith(self._prefix):
            raise NotFoundError(f"there is nothing at {path:.200}: this server's paths begin with {self._prefix}")
        scope["path"] = "/v1/" + path.removeprefix(self._prefix)

    def _authorise(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        scope["hutch.principal"] = "anyone"
        if self._settings.open:
            _same_machine(headers)
            return
        if scope["path"] in _PUBLIC:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise UnauthenticatedError("a key is needed: send it as 'Authorization: Bearer KEY'")
        given = _digest(key.strip())
        if _any_equal(given, self._full):
            scope["hutch.principal"] = "all"
        elif _any_equal(given, self._reading):
            scope["hutch.principal"] = "read"
            if not _only_reads(scope):
                raise PermissionDeniedError("this key may only read")
        else:
            raise UnauthenticatedError("the key is not known to this server")

    def _body(self, scope: Scope, receive: Receive, headers: dict[bytes, bytes]) -> Body:
        settings = self._settings
        if _STREAMED.match(scope["path"]):
            return Body(receive, limit=settings.max_transfer_bytes, stall=settings.stall_seconds)
        limit = settings.max_json_bytes
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limit:
            raise PayloadTooLargeError(f"the body is larger than the limit of {limit} bytes")
        return Body(receive, limit=limit, seconds=settings.body_seconds)


def _path(scope: Scope) -> str:
    raw = scope.get("raw_path")
    path = raw.decode("latin-1") if raw else quote(scope["path"])
    return re.sub("//+", "/", path)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _any_equal(given: bytes, known: Iterable[bytes]) -> bool:
    """Compare with all of them, each in constant time."""
    found = False
    for digest in known:
        found |= hmac.compare_digest(given, digest)
    return found


def _only_reads(scope: Scope) -> bool:
    if scope["type"] == "http":
        return scope["method"] in _READING
    if scope["path"].endswith("/relay"):  # which lets through what is right
        return True
    return b"stdin=0" in scope["query_string"].split(b"&") or b"stdin=false" in scope["query_string"].split(b"&")


def _same_machine(headers: dict[bytes, bytes]) -> None:
    """Without a key, a web page that someone on this machine looks at must not get through: neither by another
    site's script nor by a name that was made to point here."""
    host = headers.get(b"host", b"localhost").decode("latin-1")
    if not _is_loopback(host):
        raise PermissionDeniedError("this server has no key and answers only to localhost; give it one with --api-key")
    origin = headers.get(b"origin")
    if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
        raise PermissionDeniedError("this server has no key and does not answer to other web sites")


def _is_loopback(host: str) -> bool:
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _with_id(send: Send, number: str) -> Send:
    async def with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            name = REQUEST_ID.encode()
            headers = [pair for pair in message.get("headers", ()) if pair[0].lower() != name]
            message = {**message, "headers": [*headers, (name, number.encode())]}
        await send(message)

    return with_id


def _refusing(scope: Scope, receive: Receive, send: Send, number: str) -> Send:
    """A socket that is closed before it was accepted would look like a refused credential (a bare 403). Only an
    unknown path comes to that."""
    accepted = False

    async def refuse(message: Message) -> None:
        nonlocal accepted
        if message["type"] == "websocket.close" and not accepted:
            error = NotFoundError(f"there is no socket at {scope['path']:.200}")
            await envelope(error, number)(scope, receive, send)
            return
        accepted = accepted or message["type"] in ("websocket.accept", "websocket.http.response.start")
        await send(message)

    return refuse
