"""Streaming decompression."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
from typing import TYPE_CHECKING

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from hutch.errors import ImageError
from hutch.image.decompress import PIECE, Decoder, is_compressed

if TYPE_CHECKING:
    from collections.abc import Callable


def zstd_compress(data: bytes) -> bytes:
    """With a checksum: otherwise incompressible data can change unnoticed."""
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstd_compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}


def decode(data: bytes, step: int) -> bytes:
    decoder = Decoder()
    pieces = [piece for at in range(0, len(data), step) for piece in decoder.feed(data[at : at + step])]
    pieces += decoder.finish()
    assert all(len(piece) <= PIECE for piece in pieces)
    return b"".join(pieces)


@pytest.mark.parametrize("step", [11, 4096, 10 << 20])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_round_trip(name: str, step: int) -> None:
    content = os.urandom(3000) + bytes(5 << 20) + os.urandom(3000)
    if step == 11:
        content = content[:9000]
    assert decode(COMPRESSORS[name](content), step) == content


@given(st.sampled_from(sorted(COMPRESSORS)), st.lists(st.binary(max_size=300), max_size=3), st.integers(1, 50))
def test_members_in_a_row_are_one_stream(name: str, parts: list[bytes], step: int) -> None:
    compress = COMPRESSORS[name]
    if name == "plain" and is_compressed(b"".join(parts)):
        return
    assert decode(b"".join(map(compress, parts)), step) == b"".join(parts)


def test_padding_and_skippable_frames() -> None:
    assert decode(gzip.compress(b"a") + bytes(100) + gzip.compress(b"b") + bytes(7), 5) == b"ab"
    assert decode(zstd.compress(b"a") + SKIPPABLE + zstd.compress(b"b"), 5) == b"ab"


@pytest.mark.parametrize("name", ["gzip", "zstd", "xz", "bzip2"])
def test_corruption(name: str) -> None:
    # Always the same bytes: bzip2 has no marks within a block, so now and then damage looks like a missing end.
    data = COMPRESSORS[name](random.Random(1).randbytes(5000))
    with pytest.raises(ImageError, match="too early"):
        decode(data[:-4], 100)
    with pytest.raises(ImageError, match="corrupt"):
        decode(data[:2000] + bytes(200) + data[2200:], 100)
    with pytest.raises(ImageError, match=r"corrupt|too early"):
        decode(data + b"trailing rubbish", 100)


def test_a_giant_window_is_refused() -> None:
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 30, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    data = compressor.compress(b"x" * 10) + compressor.flush()
    with pytest.raises(ImageError, match="corrupt"):
        decode(data, 100)


def test_a_bomb_comes_in_bounded_pieces() -> None:
    decoder = Decoder()
    pieces = decoder.feed(gzip.compress(bytes(256 << 20), 9))
    assert sum(len(piece) for _, piece in zip(range(4), pieces, strict=False)) <= 4 * PIECE
