"""Names, looked up on the host: its hosts file first, then its name servers."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import dns.asyncquery
import dns.exception
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import msgspec

from hutch.core.policy import Address, plain_name
from hutch.errors import NetworkError

if TYPE_CHECKING:
    from collections.abc import Sequence


_TRY_SECONDS = 2.0
_TRIES = 3
_CACHED = 4096
_MAX_TTL = 300


class Sources(msgspec.Struct, frozen=True):
    """Where names are looked up. ``hosts``: names with fixed addresses; ``servers``: (address, port)."""

    servers: tuple[tuple[str, int], ...]
    hosts: dict[str, tuple[Address, ...]] = {}


def host_sources(resolv: Path = Path("/etc/resolv.conf"), hosts: Path = Path("/etc/hosts")) -> Sources:
    """Read the host's own configuration (resolv.conf(5), hosts(5)). ``$HUTCH_DNS``, addresses with commas between
    them, takes the place of the name servers."""
    servers = [(word, 53) for word in os.environ.get("HUTCH_DNS", "").split(",") if _address(word) is not None]
    for line in [] if servers else _lines(resolv):
        words = line.split()
        if words[:1] == ["nameserver"] and len(words) > 1 and _address(words[1]) is not None:
            servers.append((words[1], 53))
    fixed: dict[str, tuple[Address, ...]] = {}
    for line in _lines(hosts):
        first, *names = line.partition("#")[0].split() or [""]
        address = _address(first)
        for name in map(plain_name, names):
            if name and address is not None:
                fixed[name] = (*fixed.get(name, ()), address)
    return Sources(tuple(servers), fixed)


def reaches_ipv6() -> bool:
    """Whether the host has a route to the rest of IPv6."""
    return source_address(ipaddress.ip_address("2000::1")) is not None


def source_address(peer: Address) -> Address | None:
    """Return the host's address from which it would talk to a peer; its own, if the peer is itself. Nothing is
    sent."""
    family = socket.AF_INET if peer.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(peer), 9))
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    except OSError:
        return None


class Resolver:
    """See the module. Answers are cached for as long as they say, at most five minutes."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._cache: OrderedDict[tuple[dns.name.Name, int], tuple[float, dns.message.Message]] = OrderedDict()

    def fixed(self, name: str, kind: int) -> Sequence[Address]:
        """Return the addresses that the hosts file gives a name (``kind``: A or AAAA)."""
        family = {dns.rdatatype.A: 4, dns.rdatatype.AAAA: 6}[dns.rdatatype.RdataType(kind)]
        return [each for each in self._sources.hosts.get(name, ()) if each.version == family]

    def knows(self, name: str) -> bool:
        """Whether the hosts file has the name."""
        return name in self._sources.hosts

    async def addresses(self, name: str) -> list[Address]:
        """Return all addresses of a name, IPv4 first. Raises `NetworkError` when it has none, or nobody answers."""
        if self.knows(name):
            return list(self._sources.hosts[name])
        kinds = [dns.rdatatype.A, *([dns.rdatatype.AAAA] if reaches_ipv6() else [])]
        answers: dict[int, list[Address]] = {}
        failures: list[NetworkError] = []

        async def ask(kind: dns.rdatatype.RdataType) -> None:
            try:
                answers[kind] = addresses_in(await self.ask(dns.name.from_text(name), kind), kind)
            except NetworkError as error:
                failures.append(error)

        async with anyio.create_task_group() as tasks:
            for kind in kinds:
                tasks.start_soon(ask, kind)
        found = [address for kind in kinds for address in answers.get(kind, ())]
        if not found:
            raise failures[0] if failures else NetworkError(f"the name {name} has no address")
        return found

    async def ask(self, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> dns.message.Message:
        """Return the answer of a name server, whole: over TCP where UDP cannot carry it.

        Raises `NetworkError` when no server gives one.
        """
        key = (name.canonicalize(), int(kind))
        cached = self._cache.get(key)
        if cached is not None and cached[0] > time.monotonic():
            self._cache.move_to_end(key)
            return cached[1]
        answer = await self._ask_servers(dns.message.make_query(name, kind, use_edns=0, payload=1232), name)
        self._cache[key] = (time.monotonic() + _time_to_live(answer), answer)
        while len(self._cache) > _CACHED:
            self._cache.popitem(last=False)
        return answer

    async def _ask_servers(self, query: dns.message.Message, name: dns.name.Name) -> dns.message.Message:
        reason = "the host names no name server in /etc/resolv.conf"
        for turn in range(_TRIES):
            for address, port in self._sources.servers:
                try:
                    answer, _ = await dns.asyncquery.udp_with_fallback(
                        query, address, port=port, timeout=_TRY_SECONDS * (turn + 1)
                    )
                except (OSError, EOFError, dns.exception.DNSException) as error:
                    reason = str(error) or type(error).__name__
                    continue
                if answer.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                    return answer
                reason = f"it answers {dns.rcode.to_text(answer.rcode())}"
        raise NetworkError(f"the name {name.to_text(omit_final_dot=True)} cannot be looked up: {reason}")


def addresses_in(answer: dns.message.Message, kind: int) -> list[Address]:
    """Return the addresses of this kind in an answer, whatever aliases led to them."""
    return [
        ipaddress.ip_address(record.to_text())
        for records in answer.answer
        if records.rdtype == kind and records.rdclass == dns.rdataclass.IN
        for record in records
    ]


def _time_to_live(answer: dns.message.Message) -> float:
    times = [records.ttl for records in (*answer.answer, *answer.authority)]
    return min(times, default=0) if min(times, default=0) < _MAX_TTL else _MAX_TTL


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
