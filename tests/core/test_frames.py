"""The frame codec: whole round trips, any cuts, rubbish."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.core.frames import HEADER, MAX_PAYLOAD, Decoder, Frame, FrameError, encode
from hutch.core.ids import ALPHABET

ids = st.text(ALPHABET, max_size=12)
frames = st.builds(
    Frame,
    type=st.integers(0, 255),
    stream=st.integers(0, 2),
    req=st.integers(0, 2**32 - 1),
    exec_id=ids,
    payload=st.binary(max_size=200),
)


def on_the_wire(frame: Frame) -> bytes:
    return encode(frame.type, frame.payload, stream=frame.stream, req=frame.req, exec_id=frame.exec_id)


@given(st.lists(frames, max_size=8), st.data())
def test_any_cut_gives_the_same_frames(sent: list[Frame], data: st.DataObject) -> None:
    wire = b"".join(map(on_the_wire, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=12)))
    decoder = Decoder()
    got: list[Frame] = []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        got += decoder.receive(wire[start:end])
    assert got == sent


def test_byte_by_byte_through_a_reused_buffer() -> None:
    sent = [Frame(80, 1, 0, "abc", bytes(300)), Frame(84, 0, 7, "A" * 12, b"x")]
    buffer = bytearray(1)
    view = memoryview(buffer)
    decoder = Decoder()
    got: list[Frame] = []
    for byte in b"".join(map(on_the_wire, sent)):
        buffer[0] = byte
        got += decoder.receive(view)
    assert got == sent


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_rubbish_is_refused_and_never_anything_else(pieces: list[bytes]) -> None:
    decoder = Decoder()
    try:
        for piece in pieces:
            for frame in decoder.receive(piece):
                assert frame.stream <= 2
                assert len(frame.payload) <= MAX_PAYLOAD
                assert frame.exec_id == "" or frame.exec_id.isalnum()
    except FrameError:
        pass


def header(**changes: object) -> bytes:
    fields = {"length": 0, "type": 80, "stream": 1, "zero": 0, "req": 0, "id": b"abc"} | changes
    return HEADER.pack(*fields.values())


@pytest.mark.parametrize(
    "wire",
    [
        header(length=MAX_PAYLOAD + 1),
        header(length=2**32 - 1),
        header(stream=3),
        header(zero=1),
        header(id=b"a b"),
        header(id=b"a\0b"),
        header(id=b"\0b"),
        header(id="é".encode()),
        header(id=b"../etc"),
    ],
)
def test_malformed_headers_are_refused_at_once(wire: bytes) -> None:
    with pytest.raises(FrameError):
        Decoder().receive(wire)


def test_the_largest_payload_passes_and_a_larger_one_is_not_sent() -> None:
    frame = Frame(80, 1, 1, "x", bytes(MAX_PAYLOAD))
    assert Decoder().receive(on_the_wire(frame)) == [frame]
    with pytest.raises(ValueError, match="larger"):
        encode(80, bytes(MAX_PAYLOAD + 1))
