"""What the first bytes of a connection say about the peer that is wanted: TLS (with its server name), HTTP, or
neither. Fed as they come; nothing is kept beyond a bound."""

from __future__ import annotations

import enum
import re
import struct

from hutch.core.policy import plain_name

LIMIT = 32768
"""Bytes after which a beginning that is still not complete is given up. Those of the largest clients in use are
below 4 KiB."""

_HTTP = re.compile(rb"[A-Z]{2,20} ")
_HTTP_BEGINNING = re.compile(rb"[A-Z]{0,20} ?")
_HANDSHAKE, _CLIENT_HELLO = 22, 1
_SERVER_NAME, _PROTOCOLS, _ENCRYPTED_HELLO = 0, 16, 0xFE0D


class Kind(enum.Enum):
    """What a connection speaks."""

    TLS = enum.auto()
    HTTP = enum.auto()
    OTHER = enum.auto()


class Sniffer:
    """Feed it with `feed` until ``kind`` is not ``None``. ``name`` is the server name of TLS; empty: there is none, or
    none that can be believed (the true one is encrypted). ``protocols``: what the client can speak within TLS, as far
    as it says (ALPN); ``ciphers``: the cipher suites that it offers, by which clients differ."""

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self.name = ""
        self.protocols: tuple[bytes, ...] = ()
        self.ciphers = b""
        # All bytes, as they came: whoever asks passes them on.
        self.data = bytearray()

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self.data += data
        if self.kind is None:
            self.kind = self._judge()
        if self.kind is None and len(self.data) >= LIMIT:
            self.kind = Kind.OTHER

    def _judge(self) -> Kind | None:
        if not self.data:
            return None
        if self.data[0] == _HANDSHAKE:
            return self._judge_tls()
        if self.data.startswith(b"PRI "):  # HTTP/2 without TLS
            return Kind.OTHER
        if _HTTP.match(self.data):
            return Kind.HTTP
        return None if _HTTP_BEGINNING.fullmatch(self.data) else Kind.OTHER

    def _judge_tls(self) -> Kind | None:
        """RFC 8446, 5.1: the message may be cut into records anywhere."""
        message = bytearray()
        position = 0
        while True:
            if len(self.data) < position + 5:
                return None
            kind, major, length = struct.unpack_from(">BBxH", self.data, position)
            if kind != _HANDSHAKE or major != 3 or not 0 < length <= 16384:
                return Kind.OTHER
            message += self.data[position + 5 : position + 5 + length]
            if message and message[0] != _CLIENT_HELLO:
                return Kind.OTHER
            if len(message) >= 4 and len(message) >= 4 + int.from_bytes(message[1:4], "big"):
                break
            position += 5 + length
        try:
            self._read_hello(message[4 : 4 + int.from_bytes(message[1:4], "big")])
        except (struct.error, IndexError, ValueError):
            return Kind.OTHER
        return Kind.TLS

    def _read_hello(self, hello: bytearray) -> None:
        """RFC 8446, 4.1.2. Raises `ValueError` (or what cut fields raise) for a malformed one."""
        position = 34  # version, random
        position += 1 + hello[position]  # session id
        suites = position + 2
        position = suites + _u16(hello, position)
        ciphers = _without_grease(hello[suites:position])
        position += 1 + hello[position]  # compression methods
        found = _extensions(hello, position) if position != len(hello) else {}
        protocols = _protocols(found[_PROTOCOLS]) if _PROTOCOLS in found else ()
        if _SERVER_NAME in found and _ENCRYPTED_HELLO not in found:
            self.name = _server_name(found[_SERVER_NAME])
        self.protocols, self.ciphers = protocols, ciphers


def _extensions(hello: bytearray, position: int) -> dict[int, bytearray]:
    end = position + 2 + _u16(hello, position)
    position += 2
    if end != len(hello):
        raise ValueError("malformed extensions")
    found: dict[int, bytearray] = {}
    while position < end:
        kind, length = struct.unpack_from(">HH", hello, position)
        position += 4 + length
        if kind in found or position > end:
            raise ValueError("malformed extension")
        found[kind] = hello[position - length : position]
    return found


def _server_name(names: bytearray) -> str:
    """RFC 6066, 3."""
    if _u16(names, 0) != len(names) - 2 or names[2] != 0 or _u16(names, 3) != len(names) - 5:
        raise ValueError("malformed server name")
    return plain_name(names[5:].decode("ascii"))


def _protocols(names: bytearray) -> tuple[bytes, ...]:
    """RFC 7301, 3.1."""
    if _u16(names, 0) != len(names) - 2:
        raise ValueError("malformed protocols")
    position, found = 2, []
    while position < len(names):
        start = position + 1
        position = start + names[position]
        if position > len(names) or position == start:
            raise ValueError("malformed protocol")
        found.append(bytes(names[start:position]))
    return tuple(found)


def _without_grease(ciphers: bytearray) -> bytes:
    """Leave out the values that mean nothing and are another each time (RFC 8701)."""
    pairs = (bytes(ciphers[at : at + 2]) for at in range(0, len(ciphers), 2))
    return b"".join(pair for pair in pairs if not (pair[0] == pair[-1] and pair[0] & 15 == 10))


def _u16(data: bytearray, position: int) -> int:
    (number,) = struct.unpack_from(">H", data, position)
    return int(number)
