"""Packets, byte by byte: those that hostile boxes make by hand, and those that are seen on the link to the world."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.net.world import World

TCP, UDP, ICMP, ICMP6 = socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6
MORE_FRAGMENTS = 0x2000
_EVERY_PROTOCOL, _IPV4, _IPV6 = 0x0003, 0x0800, 0x86DD
_SOL_PACKET, _PACKET_STATISTICS, _PACKET_OUTGOING, _SO_RCVBUFFORCE = 263, 6, 4, 33
_ROOM = 16 << 20
_ECHO_REQUEST, _ECHO_REQUEST6 = 8, 128
_SYN, _SYN_OR_ACK = 0x02, 0x12
_NEIGHBOURS = range(130, 144)
"""The kernels' own messages about routers and neighbours."""


def frame(packet: bytes, *, target: str = "525500000001", source: str = "525400123456", tags: bytes = b"") -> bytes:
    """Return a frame of Ethernet; ``tags``: of VLANs."""
    kind = _IPV6 if packet[:1] and packet[0] >> 4 == 6 else _IPV4
    return bytes.fromhex(target) + bytes.fromhex(source) + tags + kind.to_bytes(2, "big") + packet


def ipv4(
    source: str, target: str, protocol: int, body: bytes, *, fragment: int = 0, options: bytes = b"", number: int = 1
) -> bytes:
    """Return a packet. ``fragment``: the field of flags and offset; ``options``: of a length divisible by four."""
    size = 20 + len(options)
    head = struct.pack(">BBHHHBBH", 0x40 | size // 4, 0, size + len(body), number, fragment, 64, protocol, 0)
    head += _packed(source) + _packed(target) + options
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + body


def ipv6(source: str, target: str, protocol: int, body: bytes) -> bytes:
    """Return a packet; ``protocol`` may be that of a header that follows."""
    return struct.pack(">IHBB", 6 << 28, len(body), protocol, 64) + _packed(source) + _packed(target) + body


def udp(source: str, target: str, port: int, data: bytes, *, own_port: int = 4444) -> bytes:
    """Return a datagram, to be put into a packet."""
    return _summed(source, target, UDP, struct.pack(">HHHH", own_port, port, 8 + len(data), 0) + data, 6)


def syn(source: str, target: str, port: int) -> bytes:
    """Return the first segment of a connection, to be put into a packet."""
    return _summed(source, target, TCP, struct.pack(">HHIIBBHHH", 4444, port, 1, 0, 5 << 4, 2, 8192, 0, 0), 16)


def echo_request(source: str, target: str) -> bytes:
    """Return what ping(8) sends, to be put into a packet."""
    if ":" in source:
        return _summed(source, target, ICMP6, struct.pack(">BBHHH", _ECHO_REQUEST6, 0, 0, 7, 1) + b"hello", 2)
    body = struct.pack(">BBHHH", _ECHO_REQUEST, 0, 0, 7, 1) + b"hello"
    return body[:2] + struct.pack(">H", checksum(body)) + body[4:]


def whole(source: str, target: str, protocol: int, body: bytes) -> bytes:
    """Return a packet of the addresses' version of IP."""
    return (ipv6 if ":" in source else ipv4)(source, target, protocol, body)


def checksum(data: bytes) -> int:
    """RFC 1071, as its text says."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _summed(source: str, target: str, protocol: int, body: bytes, at: int) -> bytes:
    pseudo = _packed(source) + _packed(target) + struct.pack(">II", len(body), protocol)
    return body[:at] + struct.pack(">H", checksum(pseudo + body)) + body[at + 2 :]


def _packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


class Packet(NamedTuple):
    """What is known of one packet. ``port``: of its target; of ICMP the type; 0 where there is none. ``goes_on``: it
    belongs to a connection that is there, or tells what became of another packet."""

    source: str
    target: str
    protocol: int
    port: int
    goes_on: bool


class Tap:
    """Sees every packet that comes from the host to the world, whatever it is."""

    def __init__(self, receiver: socket.socket) -> None:
        self._socket = receiver

    def packets(self) -> list[Packet]:
        """Return what was seen since the last time. All of it: none was lost."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, (_, kind, direction, *_) = self._socket.recvfrom(65536)
                if direction != _PACKET_OUTGOING and kind in (_IPV4, _IPV6) and not _is_housekeeping(data):
                    found.append(_read(data))
        _, lost = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        assert lost == 0
        return found


@contextlib.contextmanager
def tapped(world: World) -> Iterator[Tap]:
    """Tap the only link to the world."""
    with world.open(socket.AF_PACKET, socket.SOCK_DGRAM, "far", _EVERY_PROTOCOL) as receiver:
        receiver.setblocking(False)
        receiver.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
        yield Tap(receiver)


def _is_housekeeping(data: bytes) -> bool:
    return data[0] >> 4 == 6 and (data[6] == 0 or (data[6] == ICMP6 and data[40] in _NEIGHBOURS))


def _read(data: bytes) -> Packet:
    if data[0] >> 4 == 6:
        source, target, protocol, body = data[8:24], data[24:40], data[6], data[40:]
    else:
        source, target, protocol, body = data[12:16], data[16:20], data[9], data[(data[0] & 15) * 4 :]
        if int.from_bytes(data[6:8], "big") & 0x1FFF:
            body = b""  # a fragment that is not the first
    port = body[0] if protocol in (ICMP, ICMP6) and body else 0
    goes_on = protocol in (ICMP, ICMP6) and port not in (_ECHO_REQUEST, _ECHO_REQUEST6)
    if protocol in (TCP, UDP):
        port = int.from_bytes(body[2:4], "big")
        goes_on = protocol == TCP and len(body) > 13 and body[13] & _SYN_OR_ACK != _SYN
    return Packet(str(ipaddress.ip_address(source)), str(ipaddress.ip_address(target)), protocol, port, goes_on)
