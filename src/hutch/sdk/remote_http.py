"""The HTTP side of the remote SDK: JSON requests, streams, the error envelope, retries of what may be repeated."""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakSet

import anyio
import httpx2
import msgspec

from hutch.errors import (
    HutchError,
    InvalidArgumentError,
    MetadataError,
    RuntimeClosedError,
    UpstreamUnavailableError,
)
from hutch.sdk.remote_wire import ConnectionFailed, dumps, error_from, error_from_body
from hutch.types import Progress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from hutch.sdk.remote_socket import WebSocket

T = TypeVar("T")

# A server that works on an answer shows every five seconds that it is there.
_TIMEOUT = httpx2.Timeout(30.0, connect=10.0, pool=None)
_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=60.0)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
_PREFIX = re.compile(r"[A-Za-z0-9._~-]*(/[A-Za-z0-9._~-]+)*\Z")
_UNPREFIXED = ("/v1/me", "/v1/config", "/v1/health")
_FINISH_SECONDS = 1.0
STREAM_TYPE = "application/x-ndjson"


class Http:
    """A server's base URL, the key for it, and a pool of connections."""

    def __init__(self, url: str, api_key: str | None, *, path_prefix: str = "", patience: float = 8.0) -> None:
        """``path_prefix``: what the server's paths have after ``/v1/``. ``patience``: how long a request that may be
        repeated is repeated after the connection failed."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidArgumentError(f"{url!r} is not the address of a server; it has the form http://host:port")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise InvalidArgumentError("the API key has characters that no key has")
        if not _PREFIX.match(prefix := path_prefix.strip("/")):
            raise InvalidArgumentError(f"{path_prefix!r} is not the path prefix of a server, such as 'team-1'")
        self.url = url.rstrip("/")
        self._prefix = f"/{prefix}" if prefix else ""
        self._patience = patience
        self.headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # The WebSockets beside the pool.
        self.sockets: WeakSet[WebSocket] = WeakSet()
        self._client = httpx2.AsyncClient(
            base_url=self.url, headers=self.headers, timeout=_TIMEOUT, limits=_LIMITS, trust_env=False
        )

    def path(self, path: str) -> str:
        """Where the server has one of our paths, which begin with ``/v1/``."""
        return f"/v1{self._prefix}{path.removeprefix('/v1')}" if path not in _UNPREFIXED else path

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        async with anyio.create_task_group() as tasks:
            for link in list(self.sockets):
                tasks.start_soon(link.finish, _FINISH_SECONDS)
        await self._client.aclose()

    async def get(self, path: str, kind: type[T], **query: object) -> T:
        """Get a value; repeated while the connection fails."""
        value: T = await self.repeat(lambda: self.call("GET", path, kind, query=query))
        return value

    async def call(
        self,
        method: str,
        path: str,
        kind: type[T],
        body: object = None,
        *,
        query: Mapping[str, object] | None = None,
        content: AsyncIterator[bytes] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> T:
        """Make one request and return its checked answer. Raises the error that the server reported, or
        `UpstreamUnavailableError`."""
        async with self.stream(method, path, body, query=query, content=content) as response:
            if response.headers.get("content-type", "").startswith(STREAM_TYPE):
                result = await _last(response, progress)
            else:
                data = await response.aread()
                try:
                    result = json.loads(data) if data else None
                except ValueError:
                    raise UpstreamUnavailableError(
                        f"{self.url} answered what is no JSON; is it a Hutch server?"
                    ) from None
        try:
            return msgspec.convert(result, kind)
        except msgspec.ValidationError as error:
            raise MetadataError(f"the answer of {self.url} to {method} {path} is not understood: {error}") from None

    @contextlib.asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        query: Mapping[str, object] | None = None,
        content: AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[httpx2.Response]:
        """Make one request and yield its answer, which is a success."""
        headers = {}
        if content is not None:
            headers["Content-Type"] = "application/octet-stream"
        elif body is not None:
            headers["Content-Type"] = "application/json"
        try:
            async with self._client.stream(
                method,
                self.path(path),
                params={name: str(value) for name, value in (query or {}).items() if value is not None},
                content=content if content is not None else dumps(body) if body is not None else None,
                headers=headers,
            ) as response:
                if not response.is_success:
                    raise error_from(response.status_code, await response.aread())
                yield response
        except httpx2.HTTPError as error:
            raise ConnectionFailed(f"{self.url} does not answer: {_text(error)}") from error
        except RuntimeError:
            if self._client.is_closed:
                raise RuntimeClosedError("the runtime is closed; use it inside `async with`") from None
            raise

    async def repeat(self, attempt: Callable[[], Any]) -> Any:
        """Make attempts until one gets an answer, or patience ends."""
        deadline = anyio.current_time() + self._patience
        pause = _FIRST_PAUSE
        while True:
            try:
                return await attempt()
            except ConnectionFailed:
                if anyio.current_time() + pause > deadline:
                    raise
            await anyio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


async def _last(response: httpx2.Response, progress: Callable[[Progress], None] | None) -> Any:
    """Read an answer that took long: empty lines, progress, and at the end the result or the error."""
    async for line in response.aiter_lines():
        if not line:
            continue
        message = json.loads(line)
        if "progress" in message:
            if progress is not None:
                progress(msgspec.convert(message["progress"], Progress))
        elif "error" in message:
            raise error_from_body(message["error"])
        else:
            return message.get("result")
    raise ConnectionFailed("the server broke off its answer")


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


__all__ = ["ConnectionFailed", "Http", "HutchError"]
