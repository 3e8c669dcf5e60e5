"""Where the gateway takes part in TLS: at the hosts of a box's secrets, whose values it puts into requests."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import msgspec

from hutch.core.policy import Rule, parse_rule, rule_admits
from hutch.core.secrets import Authority, Substitution, host_rules, placeholder, substitute
from hutch.net.authority import Impersonator

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import h11

    from hutch.types import Secret


class _Bound(msgspec.Struct, frozen=True):
    """A secret and the hosts that it is for."""

    substitution: Substitution
    rules: tuple[Rule, ...]


class Interceptor:
    """The secrets of one box, and the authority that it trusts."""

    def __init__(self, secrets: Iterable[Secret], values: Mapping[str, str], authority: Authority) -> None:
        self._bound = tuple(
            _Bound(
                Substitution(placeholder(secret).encode(), values[secret.name].encode()),
                tuple(map(parse_rule, host_rules(secret))),
            )
            for secret in secrets
        )
        self._impersonator = Impersonator(authority)
        self.client_context = ssl.create_default_context()
        self.client_context.set_alpn_protocols(["http/1.1"])

    def has_port(self, port: int) -> bool:
        """Whether a host of some secret has this port."""
        return any(rule.admits(port) for bound in self._bound for rule in bound.rules)

    def is_for(self, name: str, port: int) -> bool:
        """Whether some secret is for this host."""
        return any(rule_admits(rule, name, port) for bound in self._bound for rule in bound.rules)

    def server_context(self, name: str) -> ssl.SSLContext:
        """Return a context in which we are that host, to the box."""
        return self._impersonator.context(name)

    def fill(self, name: str, port: int, request: h11.Request) -> h11.Request:
        """Return the request with the values of the secrets that are for this host."""
        own = (b.substitution for b in self._bound if any(rule_admits(rule, name, port) for rule in b.rules))
        return substitute(request, own)
