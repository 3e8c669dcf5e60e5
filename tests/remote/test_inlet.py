"""How the bytes of a client's WebSocket are taken apart."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from hutch.core.relay import MAX_MESSAGE
from hutch.sdk.remote_inlet import Inlet

LARGE = 65536
FRAMES = st.builds(
    Frame,
    st.sampled_from([Opcode.BINARY, Opcode.TEXT, Opcode.CONT, Opcode.PING]),
    st.sampled_from([0, 1, 125, 126, 65535, LARGE, LARGE + 1, 300_000]).map(
        lambda n: bytes(range(251)) * (n // 251 + 1)
    ),
    st.booleans(),
)


def wire(frame: Frame) -> bytes:
    """As a server sends it."""
    head = bytes([frame.fin << 7 | frame.opcode])
    length = len(frame.data)
    if length < 126:
        return head + bytes([length]) + frame.data
    if length < 65536:
        return head + b"\x7e" + length.to_bytes(2) + frame.data
    return head + b"\x7f" + length.to_bytes(8) + frame.data


def take(inlet: Inlet, data: bytes, sizes: list[int]) -> list[bytes | bytearray]:
    """Receive the bytes in pieces of these sizes, then as they fit; join what goes to the protocol in a row."""
    parts: list[bytes | bytearray] = []
    left = memoryview(data)
    while left:
        room = inlet.room()
        assert len(room) > 0
        size = min(len(room), len(left), sizes.pop() if sizes else LARGE)
        room[:size] = left[:size]
        del room
        left = left[size:]
        for part in inlet.received(size):
            if parts and isinstance(part, bytes) and isinstance(parts[-1], bytes):
                parts[-1] += part
            else:
                parts.append(part)
    return parts


@settings(deadline=None)
@given(st.lists(FRAMES, max_size=6), st.lists(st.integers(1, 30), max_size=60))
def test_large_messages_come_out_whole_and_the_rest_is_for_the_protocol(frames: list[Frame], sizes: list[int]) -> None:
    expected: list[bytes | bytearray] = []
    for frame in frames:
        if frame.fin and frame.opcode is Opcode.BINARY and len(frame.data) >= LARGE:
            expected.append(bytearray(frame.data))
        elif expected and isinstance(expected[-1], bytes):
            expected[-1] += wire(frame)
        else:
            expected.append(wire(frame))
    inlet = Inlet()
    inlet.begin()
    parts = take(inlet, b"".join(map(wire, frames)), sizes)
    assert parts == expected
    assert list(map(type, parts)) == list(map(type, expected))


def test_before_the_beginning_everything_is_for_the_protocol() -> None:
    data = wire(Frame(Opcode.BINARY, bytes(LARGE)))
    assert take(Inlet(), data, [1, 10]) == [data]


@pytest.mark.parametrize(
    "data",
    [b"\x82\x7f" + (MAX_MESSAGE + 1).to_bytes(8) + bytes(20), b"\x82\xff" + LARGE.to_bytes(8) + bytes(LARGE + 4)],
)
def test_a_message_that_is_too_large_or_masked_is_for_the_protocol_to_refuse(data: bytes) -> None:
    inlet = Inlet()
    inlet.begin()
    assert take(inlet, data, []) == [data]
