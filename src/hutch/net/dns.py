"""The name server that a box sees: answers for what its policy lets it look up, refusals for the rest."""

from __future__ import annotations

import contextlib
import ipaddress
import time
from typing import TYPE_CHECKING

import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from hutch.core.policy import GATEWAY_ADDRESS, HOST_NAME, plain_name
from hutch.errors import NetworkError
from hutch.net.resolver import reaches_ipv6
from hutch.types import Outbound

if TYPE_CHECKING:
    from collections.abc import Callable

    from hutch.core.policy import Policy
    from hutch.net.journal import Journal
    from hutch.net.resolver import Resolver

_UDP_BYTES = 1232
_FIXED_TTL = 60
# Names can carry data out. What a program needs passes; a tunnel gets a few KiB a second at most.
_BURST, _PER_SECOND = 200, 20
_AT_ONCE = 64
_ADDRESSES = (dns.rdatatype.A, dns.rdatatype.AAAA)


class NameService:
    """Answers the queries of one box."""

    def __init__(self, resolver: Resolver, policy: Callable[[], Policy], journal: Journal) -> None:
        self._resolver = resolver
        self._policy = policy
        self._journal = journal
        self._tokens = float(_BURST)
        self._filled = time.monotonic()
        self._running = 0

    async def answer(self, wire: bytes, *, stream: bool) -> bytes | None:
        """Return the answer to a query (cut for UDP unless it came by a ``stream``), ``None`` for what is none."""
        try:
            query = dns.message.from_wire(wire, ignore_trailing=True)
        except dns.exception.DNSException:
            return None
        if query.flags & dns.flags.QR or not self._take_token() or self._running >= _AT_ONCE:
            return None
        response = dns.message.make_response(query, recursion_available=True)
        self._running += 1
        try:
            await self._fill(query, response)
        finally:
            self._running -= 1
        return _encode(response, 65535 if stream else max(512, min(query.payload, _UDP_BYTES)))

    def _take_token(self) -> bool:
        now = time.monotonic()
        self._tokens = min(_BURST, self._tokens + (now - self._filled) * _PER_SECOND)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    async def _fill(self, query: dns.message.Message, response: dns.message.Message) -> None:
        if query.opcode() != dns.opcode.QUERY:
            response.set_rcode(dns.rcode.NOTIMP)
            return
        if len(query.question) != 1 or query.question[0].rdclass != dns.rdataclass.IN:
            response.set_rcode(dns.rcode.REFUSED)
            return
        question = query.question[0]
        name, kind, policy = plain_name(question.name.to_text()), question.rdtype, self._policy()
        if name == HOST_NAME:
            if kind == dns.rdatatype.A:
                self._give(response, question, [GATEWAY_ADDRESS])
            return
        if not policy.may_look_up(name):
            self._journal.refuse(
                "dns", question.name.to_text(omit_final_dot=True), "the policy has no rule for the name"
            )
            response.set_rcode(dns.rcode.REFUSED)
            return
        if kind not in _ADDRESSES and policy.outbound is not Outbound.ENABLED:
            return  # an empty answer: other records carry data, or keys that hide the name in TLS
        if kind == dns.rdatatype.AAAA and not reaches_ipv6():
            return
        if self._resolver.knows(name) and kind in _ADDRESSES:
            found = [str(each) for each in self._resolver.fixed(name, kind) if policy.answer(name, each, None)]
            self._give(response, question, found)
            return
        try:
            answer = await self._resolver.ask(question.name, kind)
        except NetworkError as error:
            self._journal.refuse("dns", name, str(error))
            response.set_rcode(dns.rcode.SERVFAIL)
            return
        response.set_rcode(answer.rcode())
        response.authority.extend(answer.authority)
        response.answer.extend(kept for records in answer.answer if (kept := self._usable(name, records, policy)))

    def _usable(self, name: str, records: dns.rrset.RRset, policy: Policy) -> dns.rrset.RRset | None:
        if records.rdtype not in _ADDRESSES:
            return records
        kept = dns.rrset.RRset(records.name, records.rdclass, records.rdtype)
        kept.update_ttl(records.ttl)
        for record in records:
            if policy.answer(name, ipaddress.ip_address(record.to_text()), None):
                kept.add(record)
            else:
                self._journal.refuse(
                    "dns", record.to_text(), "a private or reserved address, and no rule names it", name
                )
        return kept if len(kept) else None

    def _give(self, response: dns.message.Message, question: dns.rrset.RRset, addresses: list[str]) -> None:
        if addresses:
            response.answer.append(
                dns.rrset.from_text_list(question.name, _FIXED_TTL, "IN", question.rdtype, addresses)
            )


def _encode(response: dns.message.Message, size: int) -> bytes:
    with contextlib.suppress(dns.exception.TooBig):
        return response.to_wire(max_size=size)
    response.flags |= dns.flags.TC  # the box asks again over TCP
    response.answer.clear()
    response.authority.clear()
    response.additional.clear()
    return response.to_wire()
