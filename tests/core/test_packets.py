"""Packets in the name of a peer: they are what a kernel would have made."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.core.packets import End, datagram, refusal

_PORTS = st.integers(1, 65535)
_FOUR = st.builds(End, st.ip_addresses(v=4), _PORTS)
_SIX = st.builds(End, st.ip_addresses(v=6), _PORTS)


def _sum(data: bytes) -> int:
    """RFC 1071, word by word; 0xFFFF for what has its checksum in it."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(st.one_of(st.tuples(_FOUR, _FOUR), st.tuples(_SIX, _SIX)), st.binary(max_size=300))
def test_datagrams(ends: tuple[End, End], data: bytes) -> None:
    source, target = ends
    packet = datagram(source, target, data)
    head = 20 if source.address.version == 4 else 40
    body = packet[head:]
    assert packet[0] >> 4 == source.address.version
    assert packet[head - 2 * len(source.address.packed) : head] == source.address.packed + target.address.packed
    assert struct.unpack(">HHH", body[:6]) == (source.port, target.port, len(body))
    assert body[8:] == data
    if source.address.version == 6:
        pseudo = source.address.packed + target.address.packed + struct.pack(">II", len(body), 17)
        assert body[6:8] != bytes(2)
        assert _sum(pseudo + body) == 0xFFFF


@pytest.mark.parametrize(("own", "peer"), [("192.0.2.2", "198.51.100.1"), ("2001:db8::2", "2001:db8::9")])
@pytest.mark.parametrize("forbidden", [True, False])
def test_refusals(own: str, peer: str, *, forbidden: bool) -> None:
    sender, wanted = End(ipaddress.ip_address(own), 5000), End(ipaddress.ip_address(peer), 53)
    packet = refusal(sender, wanted, forbidden=forbidden)
    head = 20 if sender.address.version == 4 else 40
    message = packet[head:]
    assert datagram(sender, wanted, b"")[head:][:4] in message  # whom it is about
    pseudo = b"" if head == 20 else sender.address.packed * 2 + struct.pack(">II", len(message), 58)
    assert _sum(pseudo + message) == 0xFFFF


def test_ends_are_written_as_usual() -> None:
    assert str(End(ipaddress.ip_address("::1"), 5)) == "[::1]:5"
    assert str(End(ipaddress.ip_address("127.0.0.1"), 5)) == "127.0.0.1:5"
