"""Where the bytes of a client's WebSocket come in: large messages straight into a buffer of their own size, without the
copies that a protocol for all kinds of messages makes of them. Sans-IO."""

from __future__ import annotations

import struct

from hutch.core.relay import MAX_MESSAGE

_SCRATCH = 64 * 1024
# A whole binary message with a length of 64 bits, as a server sends it: not masked.
_LARGE = b"\x82\x7f"
_LONG = struct.Struct("!Q")
_SHORT = struct.Struct("!H")
_MASKED = 0x80


class Inlet:
    """Follows the frames of a server, from `begin` on; before it, everything is for the protocol."""

    def __init__(self) -> None:
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._begun = False
        # The large message that comes in, and how much of it is there.
        self._message: bytearray | None = None
        self._filled = 0
        # So many bytes more are of a frame that is the protocol's.
        self._passing = 0
        # The start of a header that has not come in whole.
        self._rest = b""

    def begin(self) -> None:
        """The next byte is the first of a frame."""
        self._begun = True

    def room(self) -> memoryview:
        """Where to receive the next bytes."""
        return self._scratch if self._message is None else memoryview(self._message)[self._filled :]

    def received(self, size: int) -> list[bytes | bytearray]:
        """So many bytes were received. Return, in order, large messages as ``bytearray`` and what is for the protocol
        as ``bytes``."""
        if self._message is not None:
            self._filled += size
            return self._whole()
        data = self._rest + bytes(self._scratch[:size])
        if not self._begun:
            return [data]
        self._rest = b""
        parts: list[bytes | bytearray] = []
        position = 0
        while position < len(data):
            if self._passing:
                part = data[position : position + self._passing]
                self._passing -= len(part)
                parts.append(part)
            else:
                if (lengths := _lengths(data, position)) is None:
                    self._rest = data[position:]
                    break
                head, length = lengths
                if data[position : position + 2] != _LARGE or length > MAX_MESSAGE:
                    self._passing = head + length
                    continue
                part = data[position + head : position + head + length]
                self._message, self._filled = bytearray(length), len(part)
                self._message[: len(part)] = part
                position += head
                parts += self._whole()
            position += len(part)
        return parts

    def _whole(self) -> list[bytes | bytearray]:
        if self._message is None or self._filled < len(self._message):
            return []
        message, self._message = self._message, None
        return [message]


def _lengths(data: bytes, position: int) -> tuple[int, int] | None:
    """The lengths of the header and the payload of a frame; ``None`` while the header is not whole."""
    left = len(data) - position
    if left < 2:
        return None
    short = data[position + 1] & ~_MASKED
    head = {126: 4, 127: 10}.get(short, 2)
    if left < head:
        return None
    length = short
    if head > 2:
        (length,) = (_SHORT if head == 4 else _LONG).unpack_from(data, position + 2)
    return head + (4 if data[position + 1] & _MASKED else 0), length
