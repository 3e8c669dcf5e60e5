"""Cutting a byte stream between characters, for readers that decode each piece alone.

Bytes are never changed: what is not UTF-8 passes as it is. Only the beginning of a character whose end has not come
yet is held back (at most three bytes; RFC 3629, section 4, says which bytes can follow which).
"""

from __future__ import annotations

_SECOND = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}


def whole(data: bytes) -> int:
    """Return how many bytes of ``data`` come before an unfinished last character."""
    for back in range(1, min(3, len(data)) + 1):
        lead = data[-back]
        if lead & 0xC0 == 0x80:
            continue
        if not 0xC2 <= lead <= 0xF4:
            break
        length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        low, high = _SECOND.get(lead, (0x80, 0xBF))
        if back < length and (back == 1 or low <= data[1 - back] <= high):
            return len(data) - back
        break
    return len(data)


class Cutter:
    """Cuts one stream into pieces of at most ``limit`` bytes that end between characters."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tail = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the pieces that are complete now."""
        data = self._tail + data
        end = whole(data)
        self._tail = data[end:]
        pieces = []
        start = 0
        while start < end:
            piece = data[start : min(start + self._limit, end)]
            cut = len(piece) if start + len(piece) == end else whole(piece) or len(piece)
            pieces.append(piece[:cut])
            start += cut
        return pieces

    def flush(self) -> bytes:
        """Return what was held back: no more comes."""
        tail, self._tail = self._tail, b""
        return tail
