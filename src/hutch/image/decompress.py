"""Streaming decompression in bounded pieces, chosen by the content's first bytes."""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from typing import TYPE_CHECKING, Final, Protocol

from hutch.errors import ImageError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PIECE: Final = 1 << 20
"""Largest piece that is handed out, in bytes."""
_ZSTD_WINDOW_LOG: Final = 27
"""The largest zstd window that is accepted (128 MiB, what the zstd tool itself accepts)."""


class _Decompressor(Protocol):
    """What bz2, lzma and zstd have in common."""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...


class _Gzip:
    """zlib's object behind the interface of the others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self._tail = b""
        self._full = False

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        piece = self._zlib.decompress(self._tail + data if self._tail else data, max_length)
        self._tail = self._zlib.unconsumed_tail
        # zlib may have taken all input and still hold output that did not fit.
        self._full = len(piece) == max_length
        return piece

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._tail and not self._full

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


_MAGIC: Final[dict[bytes, Callable[[], _Decompressor]]] = {
    b"\x1f\x8b": _Gzip,
    b"\x28\xb5\x2f\xfd": lambda: zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
    ),
    b"\xfd7zXZ\x00": lambda: lzma.LZMADecompressor(memlimit=256 << 20),
    b"BZh": bz2.BZ2Decompressor,
}
_LONGEST_MAGIC: Final = 6


def is_compressed(head: bytes) -> bool:
    """Whether these are the first bytes (6 or more) of a compressed file."""
    return head.startswith(tuple(_MAGIC))


class Decoder:
    """Turns the compressed bytes of a layer into plain ones; several members or frames in a row are one stream.

    Feed it until the input ends, then call `finish`. Not thread-safe; works in any thread.
    """

    def __init__(self) -> None:
        self._make: Callable[[], _Decompressor] | None = None
        self._current: _Decompressor | None = None
        self._head: bytes | None = b""
        """The first bytes while the format is not known; ``None`` afterwards."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the plain bytes that the data gives, in pieces of at most `PIECE` bytes. Exhaust the iterator.

        Raises `ImageError` for corrupt data.
        """
        if self._head is not None:
            self._head += data
            if len(self._head) < _LONGEST_MAGIC:
                return
            data = self._settle(self._head)
        if self._make is None:
            yield from (data[at : at + PIECE] for at in range(0, len(data), PIECE))
            return
        try:
            yield from self._decompress(data)
        except (zlib.error, zstd.ZstdError, lzma.LZMAError, OSError) as error:
            raise ImageError(f"the compressed data is corrupt: {error}") from error

    def finish(self) -> Iterator[bytes]:
        """Yield what is left of very short input. Raises `ImageError` when a compressed stream is cut short."""
        if self._head:
            yield self._settle(self._head)
        if self._current is not None and not self._current.eof:
            raise ImageError("the compressed data ends too early")

    def _settle(self, head: bytes) -> bytes:
        self._head = None
        self._make = next((make for magic, make in _MAGIC.items() if head.startswith(magic)), None)
        return head

    def _decompress(self, data: bytes) -> Iterator[bytes]:
        assert self._make is not None
        while data:
            if self._current is None:
                # Zeros between or after members are padding (gzip's own tool accepts it as well).
                data = data.lstrip(b"\0")
                if not data:
                    return
                self._current = self._make()
            yield self._current.decompress(data, PIECE)
            while not (self._current.eof or self._current.needs_input):
                yield self._current.decompress(b"", PIECE)
            data = b""
            if self._current.eof:
                data, self._current = self._current.unused_data, None
