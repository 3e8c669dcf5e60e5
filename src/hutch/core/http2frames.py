"""The frames of an HTTP/2 connection (RFC 9113, 4), cut out of its bytes, and bounded before anybody reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADERS, SETTINGS, PUSH_PROMISE, GOAWAY, CONTINUATION = 1, 4, 5, 7, 9
ACK, END_HEADERS = 1, 4
PREFACE = -1
"""The ``kind`` of the bytes with which a client begins."""

FRAME_BYTES = 16384
"""The longest frame that a side may send without having been told otherwise."""

_PREFACE_BYTES = 24
_HEAD_BYTES = 9


class FrameError(Exception):
    """A frame that goes beyond a bound."""


class Frame(msgspec.Struct, frozen=True):
    """One frame; ``data`` is all of it, with its head."""

    kind: int
    flags: int
    data: bytes

    @property
    def payload(self) -> bytes:
        """What follows the head."""
        return self.data[_HEAD_BYTES:]


class Cutter:
    """Cuts what comes into frames. The headers of one message may take ``header_bytes``, compressed."""

    def __init__(self, header_bytes: int, *, preface: bool) -> None:
        self._header_bytes = header_bytes
        self._preface = preface
        self._data = bytearray()
        self._block: int | None = None

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take bytes, and yield the frames that are complete. Raises `FrameError`."""
        self._data += data
        if self._preface and len(self._data) >= _PREFACE_BYTES:
            self._preface = False
            yield Frame(PREFACE, 0, self._cut(_PREFACE_BYTES))
        while not self._preface and len(self._data) >= _HEAD_BYTES:
            size = int.from_bytes(self._data[:3], "big")
            if size > FRAME_BYTES:
                raise FrameError(f"a frame of {size} bytes")
            if len(self._data) < _HEAD_BYTES + size:
                break
            kind, flags = self._data[3], self._data[4]
            self._bound(kind, flags, size)
            yield Frame(kind, flags, self._cut(_HEAD_BYTES + size))

    def _cut(self, size: int) -> bytes:
        piece = bytes(self._data[:size])
        del self._data[:size]
        return piece

    def _bound(self, kind: int, flags: int, size: int) -> None:
        if (self._block is None) == (kind == CONTINUATION):
            raise FrameError("headers that are interrupted, or continued where there are none")
        if kind in (HEADERS, PUSH_PROMISE, CONTINUATION):
            self._block = (self._block or 0) + size
            if self._block > self._header_bytes:
                raise FrameError(f"headers of more than {self._header_bytes} bytes")
            if flags & END_HEADERS:
                self._block = None
