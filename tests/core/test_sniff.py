"""The first bytes of connections, however they are cut."""

from __future__ import annotations

import ssl
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.core.sniff import LIMIT, Kind, Sniffer


def hello(name: str | None) -> bytes:
    """The first message of a real TLS client."""
    context = ssl.create_default_context()
    context.check_hostname = False
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


HELLO = hello("www.example.com")


def sniff(*pieces: bytes) -> Sniffer:
    sniffer = Sniffer()
    for piece in pieces:
        sniffer.feed(piece)
    return sniffer


def records(message: bytes, sizes: list[int]) -> bytes:
    """A handshake message cut into records of these sizes, the last one the rest."""
    out, position = b"", 0
    for size in [*sizes, len(message)]:
        piece = message[position : position + size]
        position += size
        if piece:
            out += b"\x16\x03\x01" + struct.pack(">H", len(piece)) + piece
    return out


def with_extension(kind: int, body: bytes) -> bytes:
    """The hello with one more extension at its end."""
    message = bytearray(HELLO[5:])
    position = 4 + 34
    position += 1 + message[position]
    position += 2 + struct.unpack_from(">H", message, position)[0]
    position += 1 + message[position]
    more = struct.pack(">HH", kind, len(body)) + body
    struct.pack_into(">H", message, position, struct.unpack_from(">H", message, position)[0] + len(more))
    message += more
    message[1:4] = (len(message) - 4).to_bytes(3, "big")
    return records(bytes(message), [])


@given(st.lists(st.integers(1, len(HELLO) - 1), max_size=6))
def test_tls_in_pieces(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(HELLO)]
    sniffer = sniff(*(HELLO[a:b] for a, b in pairwise(places)))
    assert (sniffer.kind, sniffer.name, bytes(sniffer.data)) == (Kind.TLS, "www.example.com", HELLO)


@given(st.lists(st.integers(1, 300), max_size=6))
def test_tls_over_several_records(sizes: list[int]) -> None:
    sniffer = sniff(records(HELLO[5:], sizes))
    assert (sniffer.kind, sniffer.name) == (Kind.TLS, "www.example.com")


def test_tls_is_not_complete_before_its_end() -> None:
    assert sniff(HELLO[:-1]).kind is None


def test_tls_without_a_name_and_with_a_hidden_one() -> None:
    assert (sniff(hello(None)).kind, sniff(hello(None)).name) == (Kind.TLS, "")
    hidden = sniff(with_extension(0xFE0D, b"\0" * 40))
    assert (hidden.kind, hidden.name) == (Kind.TLS, "")
    assert sniff(with_extension(0x1234, b"")).name == "www.example.com"


def test_two_server_names_are_none() -> None:
    name = b"other.example"
    body = struct.pack(">HBH", len(name) + 3, 0, len(name)) + name
    assert sniff(with_extension(0, body)).kind is Kind.OTHER


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\n", b"PROPFIND /", b"OPTIONS * HTTP/1.1"])
def test_http(start: bytes) -> None:
    assert sniff(*(bytes([byte]) for byte in start)).kind is Kind.HTTP


@pytest.mark.parametrize(
    "start", [b"SSH-2.0-x\r\n", b"get / ", b"PRI * HTTP/2.0\r\n\r\n", b"\x00\x01", b"\x16\x02\x00\x00\x05"]
)
def test_other(start: bytes) -> None:
    assert sniff(start).kind is Kind.OTHER


def test_nothing_is_kept_beyond_the_limit() -> None:
    sniffer = sniff(b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + b"\0" * LIMIT)
    assert sniffer.kind is Kind.OTHER


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes(data: bytes, cut: int) -> None:
    """Nothing raises, and the cut does not matter."""
    whole, parts = sniff(data), sniff(data[:cut], data[cut:])
    assert (whole.kind, whole.name) == (parts.kind, parts.name)


@given(st.integers(0, len(HELLO) - 1), st.integers(0, 255))
def test_damaged_tls(position: int, value: int) -> None:
    damaged = bytearray(HELLO)
    damaged[position] = value
    assert sniff(bytes(damaged)).kind in (None, Kind.TLS, Kind.OTHER)


def test_protocols_are_told() -> None:
    names = b"\x02h2\x08http/1.1"
    sniffer = sniff(with_extension(16, struct.pack(">H", len(names)) + names))
    assert sniffer.protocols == (b"h2", b"http/1.1") and sniffer.name == "www.example.com"
    assert sniff(HELLO).protocols == ()


@pytest.mark.parametrize("body", [b"", b"\0\3\2h2\1", b"\0\3\3h2", b"\0\1\0"])
def test_malformed_protocols(body: bytes) -> None:
    assert sniff(with_extension(16, body)).kind is Kind.OTHER


def test_ciphers_are_the_same_each_time() -> None:
    assert sniff(HELLO).ciphers == sniff(hello("other.example.com")).ciphers != b""
    position = HELLO.index(sniff(HELLO).ciphers)
    grease = HELLO[:position] + b"\x3a\x3a" + HELLO[position + 2 :]
    assert sniff(grease).ciphers == sniff(HELLO).ciphers[2:]
