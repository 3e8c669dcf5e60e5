"""Logging in to registries: Basic, and the token protocol of the distribution project (spec/auth/token.md).

Who gets a credential: only the host that it was configured for, and the token service which that host names; only over
https, or plain http to this very machine.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Final

import httpx2
import msgspec

from hutch.errors import ImageError
from hutch.image.config import is_loopback

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from hutch.image.config import Credential

_SCHEME: Final = re.compile(r"[\s,]*([A-Za-z0-9._~+-]+)(?:\s+(?!=)|\s*$|(?=,))")
_PARAMETER: Final = re.compile(r'\s*,?\s*([A-Za-z0-9._~+-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_DEFAULT_LIFE: Final = 60
"""Seconds that a token lives when the service does not say (token.md)."""
_MARGIN: Final = 5


class Challenge(msgspec.Struct, frozen=True):
    """One way to log in that a server offers (RFC 9110, 11.3). ``scheme`` is in lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(header: str) -> list[Challenge]:
    """Read a ``WWW-Authenticate`` header; what cannot be understood is left out."""
    challenges: list[Challenge] = []
    at = 0
    while match := _SCHEME.match(header, at):
        at = match.end()
        parameters: dict[str, str] = {}
        while parameter := _PARAMETER.match(header, at):
            at = parameter.end()
            name, quoted, bare = parameter.groups()
            parameters[name.lower()] = bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        challenges.append(Challenge(match[1].lower(), parameters))
    return challenges


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""
    expires_in: float = _DEFAULT_LIFE


class Login:
    """What one registry host knows of us during one pull: the value of ``Authorization``, renewed when it is stale."""

    def __init__(
        self,
        origin: httpx2.URL,
        repository: str,
        credential: Credential | None,
        fetch: Callable[[httpx2.URL, Mapping[str, str]], Awaitable[bytes]],
    ) -> None:
        self.origin = origin
        self._scope = f"repository:{repository}:pull"
        self._credential = credential
        self._fetch = fetch
        self._value: str | None = None
        self._stale_at = 0.0

    @property
    def value(self) -> str | None:
        """The header's value, ``None`` when there is none (yet, or no longer)."""
        return self._value if time.monotonic() < self._stale_at else None

    def covers(self, url: httpx2.URL) -> bool:
        """Whether the login is for the server of this address (scheme, host and port: RFC 6454)."""
        own = self.origin
        return (url.scheme, url.host, url.port) == (own.scheme, own.host, own.port)

    async def answer(self, header: str) -> None:
        """Log in as the server's 401 asks. Raises `ImageError` when that cannot be done."""
        offers = {challenge.scheme: challenge.parameters for challenge in reversed(parse_challenges(header))}
        if "bearer" in offers:
            await self._fetch_token(offers["bearer"])
        elif "basic" in offers:
            if self._credential is None:
                raise ImageError("unauthenticated: the registry wants a login; configure a credential for it")
            self._value, self._stale_at = self._basic(self.origin), float("inf")
        else:
            raise ImageError(f"unauthenticated: unsupported kind of login {header[:100]!r}")

    async def _fetch_token(self, parameters: dict[str, str]) -> None:
        realm = self._realm(parameters.get("realm", ""))
        query = {"scope": parameters.get("scope") or self._scope}
        if "service" in parameters:
            query["service"] = parameters["service"]
        headers = {"Authorization": self._basic(realm)} if self._credential else {}
        answer = await self._fetch(realm.copy_merge_params(query), headers)
        try:
            token = msgspec.json.decode(answer, type=_Token)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise ImageError(f"the token service {realm.host} gave an answer that is no token") from None
        value = token.token or token.access_token
        if not value or not value.isascii() or not value.isprintable():
            raise ImageError(f"the token service {realm.host} gave an answer that is no token")
        self._value = f"Bearer {value}"
        self._stale_at = time.monotonic() + max(token.expires_in, _DEFAULT_LIFE) - _MARGIN

    def _realm(self, text: str) -> httpx2.URL:
        try:
            realm = httpx2.URL(text)
        except httpx2.InvalidURL:
            realm = httpx2.URL("")
        # A remote registry must not make us talk to services of this machine.
        inward = is_loopback(realm.host) and not is_loopback(self.origin.host)
        plain = realm.scheme == "http" and (is_loopback(realm.host) or realm.host == self.origin.host)
        downgraded = plain and self.origin.scheme == "https"
        if not realm.host or inward or downgraded or not (plain or realm.scheme == "https"):
            raise ImageError(f"the registry names a token service that is not trusted: {text[:200]!r}")
        return realm

    def _basic(self, receiver: httpx2.URL) -> str:
        assert self._credential is not None
        if receiver.scheme != "https" and not is_loopback(receiver.host):
            raise ImageError(f"the credential is not sent to {receiver.host} in plain http; use https")
        return self._credential.basic
