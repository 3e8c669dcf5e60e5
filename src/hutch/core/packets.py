"""Packets in the name of a peer: what the gateway says to a box over UDP, and why something was not delivered."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hutch.core.policy import Address

MOST_BYTES = 65535 - 20 - 8
"""The most that one datagram carries (over IPv4)."""

_HOPS = 64
_UDP, _ICMP, _ICMP6 = 17, 1, 58
_UDP_HEADER = struct.Struct(">HHHH")
_FORBIDDEN, _NO_PORT = {4: (3, 13), 6: (1, 1)}, {4: (3, 3), 6: (1, 4)}


class End(NamedTuple):
    """One end of a conversation."""

    address: Address
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"


def datagram(source: End, target: End, data: bytes) -> bytes:
    """Return a packet with a datagram. Both ends are of one version of IP."""
    header = _UDP_HEADER.pack(source.port, target.port, _UDP_HEADER.size + len(data), 0)
    if source.address.version == 6:  # where the checksum is not optional
        checksum = _checksum(_pseudo(source.address, target.address, _UDP, len(header) + len(data)) + header + data)
        header = _UDP_HEADER.pack(source.port, target.port, _UDP_HEADER.size + len(data), checksum)
    return _packet(source.address, target.address, _UDP, header + data)


def refusal(sender: End, peer: End, *, forbidden: bool) -> bytes:
    """Return the ICMP packet that tells a sender that its datagram to a peer is ``forbidden``, or that nobody listens
    there. It is from the sender's own machine, as that of a firewall would be."""
    version = sender.address.version
    kind, code = (_FORBIDDEN if forbidden else _NO_PORT)[version]
    lost = _packet(sender.address, peer.address, _UDP, _UDP_HEADER.pack(sender.port, peer.port, _UDP_HEADER.size, 0))
    message = struct.pack(">BBHI", kind, code, 0, 0) + lost
    pseudo = _pseudo(sender.address, sender.address, _ICMP6, len(message)) if version == 6 else b""
    message = struct.pack(">BBHI", kind, code, _checksum(pseudo + message), 0) + lost
    return _packet(sender.address, sender.address, _ICMP if version == 4 else _ICMP6, message)


def _packet(source: Address, target: Address, protocol: int, body: bytes) -> bytes:
    """The kernel fills in what is 0 of IPv4's header."""
    if source.version == 4:
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, _HOPS, protocol, 0)
    else:
        head = struct.pack(">IHBB", 6 << 28, len(body), protocol, _HOPS)
    return head + source.packed + target.packed + body


def _pseudo(source: Address, target: Address, protocol: int, size: int) -> bytes:
    """RFC 8200, 8.1."""
    return source.packed + target.packed + struct.pack(">II", size, protocol)


def _checksum(data: bytes) -> int:
    """RFC 1071: the sum of 16-bit words in ones' complement is the number that they make, modulo 65535."""
    return 0xFFFF - int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF or 0xFFFF
