"""Which peers a box may reach: the rules of an allow-list, and what they say about an address or a name.

A rule is ``HOST``, ``HOST:PORT`` or ``HOST:FIRST-LAST``, where HOST is an address, a network (``10.0.0.0/8``), a name,
or a name whose first label is ``*`` (all names below it, at any depth; a lone ``*``: every name). An IPv6 host stands
in brackets when a port follows.

A rule with a name admits a connection by what it says about itself (TLS SNI, HTTP Host), and whoever asks then looks
the name up himself: the address that the box chose counts for nothing.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from hutch.errors import InvalidArgumentError
from hutch.types import Outbound

if TYPE_CHECKING:
    from collections.abc import Iterable

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

HOST_NAME = "host.hutch.internal"
"""The name by which a box reaches the loopback of its host, where a rule allows that."""

GATEWAY_ADDRESS = "192.0.2.1"
"""The name server of every box, and what that name leads to. Nobody has this address (RFC 5737)."""

_ALL_PORTS = (1, 65535)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


# Refused whatever the policy, unless a rule is about just these: the host itself, the link, metadata services of clouds
# (the last line), and what is no peer.
_SPECIAL = _networks(
    *("0.0.0.0/8", "127.0.0.0/8", "::/128", "::1/128"),
    *("169.254.0.0/16", "fe80::/10", "fec0::/10"),
    *("224.0.0.0/4", "240.0.0.0/4", "ff00::/8"),
    *("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32", "fd00:ec2::/32"),
)
# A name that leads to one of these may have been pointed there by a stranger (DNS rebinding).
_PRIVATE = _networks(
    *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "192.0.0.0/24", "198.18.0.0/15", "fc00::/7"),
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Verdict(enum.Enum):
    """What a policy says about a connection to an address. ``ASK``: it depends on the name that the peer is called."""

    ALLOW = enum.auto()
    ASK = enum.auto()
    REFUSE = enum.auto()


class Rule(msgspec.Struct, frozen=True):
    """One rule: a network or a name (``*.`` in front: what is below it), and the ports, first and last."""

    network: Network | None
    name: str
    ports: tuple[int, int]

    def admits(self, port: int) -> bool:
        """Whether the port is one of the rule's."""
        return self.ports[0] <= port <= self.ports[1]


def parse_rule(text: str) -> Rule:
    """Parse a rule. Raises `InvalidArgumentError`."""
    if not isinstance(text, str):
        raise InvalidArgumentError(f"{text!r} is not a rule for a network: it must be text")
    host, ports = _split(text)
    try:
        return Rule(ipaddress.ip_network(host), "", ports)
    except ValueError as error:
        if "/" in host or ":" in host or host.replace(".", "").isdigit():
            raise InvalidArgumentError(f"{text!r} is not an address or a network: {error}") from None
    name = plain_name(host.removeprefix("*."))
    if host != "*" and not name:
        raise InvalidArgumentError(
            f"{text!r} is not a rule for a network; write e.g. example.com, *.example.com:443, 10.0.0.0/8 or [::1]:80"
        )
    return Rule(None, "*" if host == "*" else f"*.{name}" if host.startswith("*.") else name, ports)


def _split(text: str) -> tuple[str, tuple[int, int]]:
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise InvalidArgumentError(f"{text!r} is not [HOST]:PORT")
        ports = rest[1:] if rest else None
    elif text.count(":") == 1:
        host, _, ports = text.partition(":")
    else:
        host, ports = text, None
    return host, _ALL_PORTS if ports is None else _ports(text, ports)


def _ports(text: str, ports: str) -> tuple[int, int]:
    first, dash, last = ports.partition("-")
    if not dash:
        last = first
    if all(word.isascii() and word.isdigit() and len(word) <= 5 for word in (first, last)):
        low, high = int(first), int(last)
        if 1 <= low <= high <= 65535:
            return low, high
    raise InvalidArgumentError(f"{text!r}: {ports!r} is not a port or a range of ports (1-65535)")


def plain_name(text: str) -> str:
    """Return a host name in the one spelling in which names are compared; empty when it is none."""
    name = text.lower().removesuffix(".")
    if not 0 < len(name) <= 253 or not all(map(_LABEL.fullmatch, name.split("."))):
        return ""
    # What some libraries would read as an address (127.1, 0x7f.1) is not a name.
    return "" if re.fullmatch(r"\d+|0x[0-9a-f]*", name.rpartition(".")[2]) else name


class Policy:
    """What a box may reach."""

    def __init__(self, outbound: Outbound, allow: Iterable[str] = ()) -> None:
        """Raises `InvalidArgumentError` for a rule that cannot be understood."""
        self.outbound = outbound
        rules = tuple(parse_rule(text) for text in allow)
        self._networks = tuple(rule for rule in rules if rule.network is not None)
        self._names = tuple(rule for rule in rules if rule.network is None)

    def address(self, address: Address, port: int, *, own: bool = False) -> Verdict:
        """Judge a connection to an address that the box chose. ``own``: it is an address of the host."""
        if self.outbound is Outbound.DISABLED:
            return Verdict.REFUSE
        address = plain_address(address)
        if self._is_special(address, port):
            return Verdict.REFUSE
        if self._is_listed(address, port):
            return Verdict.ALLOW
        if self.outbound is Outbound.ENABLED:
            return Verdict.REFUSE if own else Verdict.ALLOW
        return Verdict.ASK if any(rule.admits(port) for rule in self._names) else Verdict.REFUSE

    def name(self, name: str, port: int) -> bool:
        """Whether a connection to this name is admitted. Names are as `plain_name` returns them."""
        if self.outbound is Outbound.DISABLED:
            return False
        anybody = self.outbound is Outbound.ENABLED and name != HOST_NAME
        return anybody or any(rule_admits(rule, name, port) for rule in self._names)

    def host(self, port: int) -> bool:
        """Whether a rule admits connections to a port of the host's loopback by its name."""
        return self.name(HOST_NAME, port)

    def answer(self, name: str, address: Address, port: int | None, *, own: bool = False) -> bool:
        """Whether an address that the name was found to have may be used. ``port``: ``None`` where it is not known
        yet."""
        if name == HOST_NAME:
            return True
        address = plain_address(address)
        if self._is_special(address, port):
            return False
        private = self.outbound is not Outbound.ENABLED and _within(address, _PRIVATE)
        return not (own or private) or self._is_listed(address, port)

    def may_look_up(self, name: str) -> bool:
        """Whether the box may ask for a name: where addresses are listed too, any name may lead to one."""
        match self.outbound:
            case Outbound.DISABLED:
                return False
            case Outbound.ENABLED:
                return True
        return bool(self._networks) or any(_matches(rule.name, name) for rule in self._names)

    def _is_listed(self, address: Address, port: int | None) -> bool:
        return any(_contains(rule.network, address) and (port is None or rule.admits(port)) for rule in self._networks)

    def _is_special(self, address: Address, port: int | None) -> bool:
        return any(self._is_special_itself(face, port) for face in (address, *_embedded(address)))

    def _is_special_itself(self, address: Address, port: int | None) -> bool:
        for special in _SPECIAL:
            if _contains(special, address):
                return not any(
                    _contains(rule.network, address) and _is_part(rule.network, special)
                    for rule in self._networks
                    if port is None or rule.admits(port)
                )
        return False


def rule_admits(rule: Rule, name: str, port: int) -> bool:
    """Whether a rule with a name is about this one, and the port."""
    return rule.admits(port) and _matches(rule.name, name)


def covers(most: Rule, rule: Rule) -> bool:
    """Whether all that a rule admits another one, ``most``, admits too."""
    if not (most.admits(rule.ports[0]) and most.admits(rule.ports[1])):
        return False
    if rule.network is not None:
        return _is_part(rule.network, most.network) if most.network is not None else False
    return most.network is None and _matches(most.name, rule.name)


def is_special(rule: Rule) -> bool:
    """Whether a rule is about what is refused whatever the policy: the loopback of the host, the link, metadata
    services."""
    return rule.name == HOST_NAME or any(_is_part(rule.network, special) for special in _SPECIAL)


def plain_address(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 one stands for (``::ffff:1.2.3.4``), otherwise the address."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address if mapped is None else mapped


def _embedded(address: Address) -> list[ipaddress.IPv4Address]:
    """The IPv4 addresses to which a translator on the way may turn an IPv6 address."""
    if not isinstance(address, ipaddress.IPv6Address):
        return []
    found = [address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [face for face in found if face is not None]


def _matches(pattern: str, name: str) -> bool:
    if pattern == name:
        return True
    if name == HOST_NAME:  # not a peer like others
        return False
    return pattern == "*" or (pattern.startswith("*.") and name.endswith(pattern[1:]))


def _within(address: Address, networks: Iterable[Network]) -> bool:
    return any(_contains(network, address) for network in networks)


def _contains(network: Network | None, address: Address) -> bool:
    return network is not None and network.version == address.version and address in network


def _is_part(part: Network | None, whole: Network) -> bool:
    return part is not None and part.prefixlen >= whole.prefixlen and _contains(whole, part.network_address)
