"""Where the gateway takes part in TLS: at the hosts of a box's secrets, whose values it puts into requests."""

from __future__ import annotations

import contextlib
import ssl
from typing import TYPE_CHECKING

import msgspec

from hutch.core.policy import Rule, parse_rule, rule_admits
from hutch.core.secrets import Authority, Substitution, host_rules, placeholder, substitute, substitute_fields
from hutch.net.authority import Impersonator

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import h11

    from hutch.core.http2 import Fields
    from hutch.core.sniff import Sniffer
    from hutch.types import Secret

HTTP1, HTTP2 = "http/1.1", "h2"
"""The names of protocols in TLS (ALPN)."""

_MOST_OPAQUE = 256
_MOST_HTTP2 = 32


class _Bound(msgspec.Struct, frozen=True):
    """A secret and the hosts that it is for."""

    substitution: Substitution
    rules: tuple[Rule, ...]
    pass_opaque: bool

    def is_for(self, name: str, port: int) -> bool:
        """Whether one of them is this."""
        return any(rule_admits(rule, name, port) for rule in self.rules)


class Interceptor:
    """The secrets of one box, and the authority that it trusts."""

    def __init__(self, secrets: Iterable[Secret], values: Mapping[str, str], authority: Authority) -> None:
        self._bound = tuple(
            _Bound(
                Substitution(placeholder(secret).encode(), values[secret.name].encode()),
                tuple(map(parse_rule, host_rules(secret))),
                secret.pass_opaque,
            )
            for secret in secrets
        )
        self._opaque: dict[tuple[str, int, bytes], None] = {}
        self._impersonator = Impersonator(authority)
        self._client_contexts = {http2: _client_context(http2=http2) for http2 in (False, True)}
        self._http2_now = 0

    def has_port(self, port: int) -> bool:
        """Whether a host of some secret has this port."""
        return any(rule.admits(port) for bound in self._bound for rule in bound.rules)

    def is_for(self, name: str, port: int) -> bool:
        """Whether some secret is for this host."""
        return any(bound.is_for(name, port) for bound in self._bound)

    def passes(self, hello: Sniffer, port: int) -> bool:
        """Whether a connection is passed on unread: the owners of all secrets for the host want that for what cannot
        be read, and this is such, by what it says or by what became of one like it."""
        if not all(bound.pass_opaque for bound in self._bound if bound.is_for(hello.name, port)):
            return False
        speaks_http = not hello.protocols or any(each.startswith((b"http/", b"h2")) for each in hello.protocols)
        return not speaks_http or _client(hello, port) in self._opaque

    def note_opaque(self, hello: Sniffer, port: int) -> None:
        """Remember that a connection could not be read."""
        if len(self._opaque) >= _MOST_OPAQUE:
            del self._opaque[next(iter(self._opaque))]
        self._opaque[_client(hello, port)] = None

    def server_context(self, name: str, protocol: str) -> ssl.SSLContext:
        """Return a context in which we are that host, to the box, and speak this protocol."""
        return self._impersonator.context(name, protocol)

    def client_context(self, *, http2: bool) -> ssl.SSLContext:
        """Return a context in which we are a client of the host, and speak HTTP/1.1; HTTP/2 rather, if that is said."""
        return self._client_contexts[http2]

    def has_room_for_http2(self) -> bool:
        """Whether one more conversation of the box may be in HTTP/2, of which each holds far more than in HTTP/1."""
        return self._http2_now < _MOST_HTTP2

    @contextlib.contextmanager
    def counting_http2(self) -> Iterator[None]:
        """Count a conversation in HTTP/2 while it lasts."""
        self._http2_now += 1
        try:
            yield
        finally:
            self._http2_now -= 1

    def fill(self, name: str, port: int, request: h11.Request) -> h11.Request:
        """Return the request with the values of the secrets that are for this host."""
        return substitute(request, self._substitutions(name, port))

    def fill_fields(self, name: str, port: int, fields: Fields) -> Fields:
        """Return the head of an HTTP/2 request with them."""
        return substitute_fields(fields, self._substitutions(name, port))

    def _substitutions(self, name: str, port: int) -> list[Substitution]:
        return [bound.substitution for bound in self._bound if bound.is_for(name, port)]


def _client_context(*, http2: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols([HTTP2, HTTP1] if http2 else [HTTP1])
    return context


def _client(hello: Sniffer, port: int) -> tuple[str, int, bytes]:
    """A program that opens a connection, as far as one can tell: one that trusts the gateway must not lose its secrets
    by another that does not."""
    return hello.name, port, hello.ciphers
