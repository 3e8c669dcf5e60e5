"""Reading one image from a registry: the pull half of the OCI distribution-spec v1.1.

A layer is a stream that survives broken connections: what has arrived has been hashed and unpacked already, so the next
request asks for the rest (RFC 9110, 14.2), of the same host or of the next mirror. The digest at the end proves all.
"""

from __future__ import annotations

import ssl
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import anyio
import httpx2
import msgspec

from hutch.core.manifest import INDEX_TYPES, MANIFEST_TYPES, MAX_DOCUMENT, verify
from hutch.core.ociref import DEFAULT_DOMAIN
from hutch.errors import ImageError
from hutch.image.auth import Login
from hutch.image.config import is_loopback

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from typing import Self

    from hutch.core.manifest import Descriptor
    from hutch.core.ociref import Reference
    from hutch.image.config import RegistryConfig

_HUB: Final = "registry-1.docker.io"
_ACCEPT: Final = ", ".join((*INDEX_TYPES, *MANIFEST_TYPES))
_CHUNK: Final = 256 << 10
_MAX_REDIRECTS: Final = 5
_MAX_ERROR: Final = 16 << 10
_MAX_TOKEN: Final = 1 << 20
_BACK_OFF: Final = 0.1
_MAX_BACK_OFF: Final = 5.0
_PROGRESS: Final = 1 << 20
"""Bytes that must arrive before the retries are counted anew."""
_PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})


class _PassingError(ImageError):
    """A failure that may be gone the next time. ``wait``: seconds that the server asks to be left alone."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class Document(msgspec.Struct, frozen=True):
    """A manifest or index as received."""

    data: bytes
    media_type: str


class Registry:
    """A repository in its registry and the mirrors of it. Use as an async context manager, in one pull.

    All methods raise `ImageError`, which names the host.
    """

    def __init__(self, reference: Reference, config: RegistryConfig) -> None:
        self._config = config
        origin = _HUB if reference.domain == DEFAULT_DOMAIN else reference.domain
        addresses = [*config.mirrors.get(reference.domain, ()), origin]
        self._hosts = [_Host(address, reference.path, config) for address in addresses]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            for host in self._hosts:
                await host.close()

    async def manifest(self, target: str) -> Document:
        """Fetch a manifest or index by tag or digest."""
        return await self._document(f"manifests/{target}", _ACCEPT, target if ":" in target else "")

    async def config(self, descriptor: Descriptor) -> bytes:
        """Fetch a config."""
        return (await self._document(f"blobs/{descriptor.digest}", "*/*", descriptor.digest)).data

    async def blob(self, descriptor: Descriptor) -> AsyncGenerator[bytes]:
        """Yield the bytes of a layer once and in order. They are not hashed here, and they may be too many."""
        at = safe = 0
        held = bytearray()  # gathered here, not by httpx2, which would lose it when the connection breaks
        attempts = _Attempts(self._hosts, self._config.retries)
        while at < descriptor.size:
            try:
                async with attempts.host.get(f"blobs/{descriptor.digest}", accept="*/*", start=at) as response:
                    skip = _check_range(response, at, descriptor)
                    async for chunk in response.aiter_raw():
                        fresh = chunk[skip:] if skip else chunk
                        skip -= len(chunk) - len(fresh)
                        at += len(fresh)
                        held += fresh
                        if len(held) >= _CHUNK:
                            yield bytes(held)
                            held.clear()
                if at < descriptor.size:
                    raise _PassingError(f"the answer ended after {at} of {descriptor.size} bytes")
            except (httpx2.HTTPError, ImageError) as error:
                if at - safe >= _PROGRESS:
                    safe = at
                    attempts.progressed()
                await attempts.failed(error)
        yield bytes(held)

    async def _document(self, path: str, accept: str, digest: str) -> Document:
        attempts = _Attempts(self._hosts, self._config.retries)
        while True:
            try:
                with anyio.fail_after(2 * self._config.read_timeout):
                    async with attempts.host.get(path, accept=accept) as response:
                        data = await _read(response, MAX_DOCUMENT)
                if digest:
                    verify(data, digest, path.partition("/")[0].rstrip("s"))
                return Document(data, response.headers.get("content-type", "").partition(";")[0].strip())
            except (httpx2.HTTPError, ImageError, TimeoutError) as error:
                await attempts.failed(error)


class _Attempts:
    """Which host is asked next, and when it is enough."""

    def __init__(self, hosts: Sequence[_Host], retries: int) -> None:
        self._hosts = deque(hosts)
        self._retries = retries
        self._failures = 0

    @property
    def host(self) -> _Host:
        """The host to ask."""
        return self._hosts[0]

    def progressed(self) -> None:
        """Forget earlier failures: the connection is poor, but it leads somewhere."""
        self._failures = 0

    async def failed(self, error: Exception) -> None:
        """Turn to the next host, after a pause when all have failed. Raises `ImageError` when there is no hope."""
        host = self._hosts.popleft()
        explained = ImageError(f"registry {host.name}: {_cause(error)}")
        if not isinstance(error, ImageError) or isinstance(error, _PassingError):
            self._hosts.append(host)
            self._failures += 1
        if not self._hosts or self._failures > self._retries:
            raise explained from error
        rounds = self._failures // len(self._hosts)
        if rounds:
            asked = error.wait if isinstance(error, _PassingError) else 0.0
            await anyio.sleep(min(max(asked, _BACK_OFF * 2 ** (rounds - 1)), _MAX_BACK_OFF))


class _Host:
    """One server that has the repository. ``address`` is ``[scheme://]host[:port][/prefix]``."""

    def __init__(self, address: str, repository: str, config: RegistryConfig) -> None:
        self._scheme, _, rest = address.rpartition("://")
        self.name, _, prefix = rest.partition("/")
        self._repository = "/".join(filter(None, (prefix.strip("/"), repository)))
        self._config = config
        self._settling = anyio.Lock()
        self._login: Login | None = None
        self._clients: dict[bool, httpx2.AsyncClient] = {}

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.aclose()

    @asynccontextmanager
    async def get(self, path: str, *, accept: str, start: int = 0) -> AsyncGenerator[httpx2.Response]:
        """Ask for a document or blob from byte ``start`` on; log in and follow redirects as needed.

        Raises `ImageError` for an answer other than success, `httpx2.HTTPError` for no answer.
        """
        login = await self._settle()
        url = login.origin.join(f"/v2/{self._repository}/{path}")
        headers = {"Accept": accept}
        if start:
            headers["Range"] = f"bytes={start}-"
        response = await self._send(url, headers, login)
        try:
            if response.status_code == 401 and login.covers(response.url):
                await response.aclose()
                await login.answer(response.headers.get("www-authenticate", ""))
                response = await self._send(url, headers, login)
            if response.status_code not in (200, 206):
                raise await _refusal(response)
            yield response
        finally:
            await response.aclose()

    async def _settle(self) -> Login:
        """Find out, once, whether the server speaks https or (where that is allowed) plain http."""
        async with self._settling:
            if self._login is None:
                scheme = self._scheme or await self._probe()
                if scheme == "http" and not self._config.plain_http(self.name):
                    raise ImageError("plain http is allowed to loopback and `insecure` hosts only")
                origin = httpx2.URL(f"{scheme}://{self.name}")
                key = DEFAULT_DOMAIN if self.name == _HUB else self.name
                credential = self._config.credential(key, self._repository)
                self._login = Login(origin, self._repository, credential, self._fetch)
            return self._login

    async def _probe(self) -> str:
        if not self._config.plain_http(self.name):
            return "https"
        try:
            async with self._client(secure=False).stream("GET", f"http://{self.name}/v2/") as response:
                # 400 is what TLS servers answer to plain http.
                return "https" if response.status_code == 400 else "http"
        except (httpx2.RemoteProtocolError, httpx2.ReadError):
            return "https"

    async def _send(self, url: httpx2.URL, headers: Mapping[str, str], login: Login) -> httpx2.Response:
        for _ in range(_MAX_REDIRECTS + 1):
            authorization = {"Authorization": login.value} if login.value and login.covers(url) else {}
            client = self._client(secure=url.scheme == "https")
            request = client.build_request("GET", url, headers={**headers, **authorization})
            response = await client.send(request, stream=True)
            if response.status_code not in (301, 302, 303, 307, 308):
                return response
            await response.aclose()
            url = self._redirected(url, response.headers.get("location", ""))
        raise ImageError(f"more than {_MAX_REDIRECTS} redirects")

    def _redirected(self, url: httpx2.URL, location: str) -> httpx2.URL:
        try:
            target = url.join(location)
        except httpx2.InvalidURL:
            raise ImageError(f"redirect to the malformed address {location[:200]!r}") from None
        host = target.netloc.decode("ascii", "replace")
        plain = target.scheme == "http" and self._config.plain_http(host)
        # A remote server must not make us talk to services of this machine.
        inward = is_loopback(host) and not is_loopback(self.name)
        if not target.host or inward or not (target.scheme == "https" or plain):
            raise ImageError(f"redirect to {location[:200]!r}, which is not allowed")
        return target

    async def _fetch(self, url: httpx2.URL, headers: Mapping[str, str]) -> bytes:
        """Fetch a token. No redirects: the headers hold a credential."""
        client = self._client(secure=url.scheme == "https")
        async with client.stream("GET", url, headers=headers) as response:
            if response.status_code != 200:
                raise await _refusal(response)
            return await _read(response, _MAX_TOKEN)

    def _client(self, *, secure: bool) -> httpx2.AsyncClient:
        """Return the client for https, or the one for plain http, which is spared the loading of certificates."""
        if secure not in self._clients:
            config = self._config
            self._clients[secure] = httpx2.AsyncClient(
                verify=True if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
                timeout=httpx2.Timeout(config.read_timeout, connect=config.connect_timeout, pool=None),
                headers={"User-Agent": "hutch", "Accept-Encoding": "identity"},
                trust_env=not is_loopback(self.name),
                follow_redirects=False,
            )
        return self._clients[secure]


async def _read(response: httpx2.Response, limit: int) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > limit:
            raise ImageError(f"the answer is longer than {limit} bytes")
    return bytes(data)


def _check_range(response: httpx2.Response, start: int, descriptor: Descriptor) -> int:
    """Return how many bytes of the answer are known already."""
    if response.status_code == 206:
        if not response.headers.get("content-range", "").startswith(f"bytes {start}-") or not start:
            raise ImageError("the answer is not the range that was asked for")
        return 0
    length = response.headers.get("content-length", "")
    if length.isdecimal() and int(length) != descriptor.size:
        size = descriptor.size
        raise ImageError(f"layer {descriptor.digest} has {length} bytes, the manifest says {size}")
    return start


class _Problem(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Problems(msgspec.Struct):
    errors: list[_Problem] = []


async def _refusal(response: httpx2.Response) -> ImageError:
    """Turn an answer that is no success into an error (distribution-spec, "Error codes")."""
    status = response.status_code
    try:
        problems = msgspec.json.decode(await _read(response, _MAX_ERROR), type=_Problems).errors
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ImageError):
        problems = []
    said = (problems[0].message or problems[0].code)[:200] if problems else ""
    said = "".join(char if char.isprintable() else "?" for char in said) or f"HTTP status {status}"
    if status in _PASSING:
        after = response.headers.get("retry-after", "")
        return _PassingError(said, float(after) if after.isdecimal() else 0.0)
    hints = {
        401: "unauthenticated: {} – check the credential, and the name: registries hide what is private",
        403: "denied: {} – check the credential and the name",
        404: "{} – check the name and tag",
    }
    return ImageError(hints.get(status, "{}").format(said))


def _cause(error: Exception) -> str:
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__
