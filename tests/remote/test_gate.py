"""What the relay lets through."""

from __future__ import annotations

import itertools
import random
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.core import agentproto as proto
from hutch.core.frames import Decoder, FrameError, encode
from hutch.core.relay import MAX_MESSAGE, OWN_REQUESTS, Downward, Upward

if TYPE_CHECKING:
    from collections.abc import Iterator

ME, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
HELLO = struct.pack("<IIII", 1, 512 * 1024, 1, 0)
MAY = [
    proto.attach(ME, {1: 0}, req=1),
    proto.detach(ME, [1]),
    proto.ack(ME, 1, 5),
    proto.stdin(ME, b"x"),
    proto.stdin_eof(ME),
    proto.signal(ME, 9, req=2),
    proto.resize(ME, 1, 1, req=3),
    proto.simple(proto.Request.FORGET, req=0, exec_id=ME),
]
MAY_NOT = [
    proto.start(ME, ["true"], req=1, env={}),
    proto.signal(OTHER, 9, req=1),
    proto.stdin(OTHER, b"x"),
    proto.attach("", {}, req=1),
    proto.poweroff(0, 0, req=1),
    *(proto.simple(kind, req=1, exec_id=ME) for kind in (proto.Request.LIST, proto.Request.STATS, proto.Request.SHM)),
    proto.signal(ME, 9, req=OWN_REQUESTS[0]),
    proto.attach(ME, {1: 0}, req=OWN_REQUESTS[-1]),
    b"\xff" * 24,
]
WINDOW = 512 * 1024


@given(st.permutations(MAY), st.lists(st.integers(0, 400)))
def test_what_a_watcher_may_ask_passes_unchanged_however_it_is_cut(frames: list[bytes], cuts: list[int]) -> None:
    data = b"".join(frames)
    gate = Upward(ME, HELLO)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    assert b"".join(gate.feed(data[a:b])[0] for a, b in itertools.pairwise(edges)) == data


@pytest.mark.parametrize("frame", MAY_NOT)
def test_nothing_else_passes(frame: bytes) -> None:
    with pytest.raises(FrameError):
        Upward(ME, HELLO).feed(frame)


@pytest.mark.parametrize("frame", MAY[3:])
def test_who_may_only_read_changes_nothing(frame: bytes) -> None:
    with pytest.raises(FrameError):
        Upward(ME, HELLO, reading=True).feed(frame)


def test_hello_and_ping_are_answered_by_the_relay() -> None:
    onward, answers = Upward(ME, HELLO).feed(proto.hello(7) + encode(proto.Request.PING, b"hi", req=8))
    masked = struct.pack("<IIII", 1, 512 * 1024, 0, 0)
    assert onward == b""
    assert answers == encode(proto.Reply.HELLO_OK, masked, req=7) + encode(proto.Reply.PONG, b"hi", req=8)


def test_before_another_relay_hello_and_ping_go_onward() -> None:
    frames = proto.hello(7) + encode(proto.Request.PING, b"hi", req=8)
    assert Upward(ME, None, reading=True).feed(frames) == (frames, b"")
    with pytest.raises(FrameError):
        Upward(ME, None, reading=True).feed(proto.stdin(ME, b"x"))


def test_what_a_client_does_by_itself_is_no_use() -> None:
    used: list[int] = []
    gate = Upward(ME, HELLO, lambda: used.append(1))
    gate.feed(b"".join((proto.hello(1), proto.attach(ME, {1: 0}, req=2), proto.ack(ME, 1, 5), proto.detach(ME, [1]))))
    assert not used
    for number, frame in enumerate(
        (proto.stdin(ME, b"x"), proto.signal(ME, 9, req=3), proto.resize(ME, 1, 1, req=4)), 1
    ):
        gate.feed(frame)
        assert len(used) == number


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("cut", [1, 30, 60])
def test_the_end_tells_whether_memory_ran_out(killed: bool, cut: int) -> None:
    end = encode(proto.Reply.EXITED, struct.pack("<iBxxxQQQQ", -9, 1, 0, 0, 0, 7), exec_id=ME)
    data = encode(proto.Reply.EOF, struct.pack("<QB", 0, 0), stream=1, exec_id=ME) + end
    gate = Downward(ME, lambda: killed)
    out = b"".join([*gate.feed(data[:cut]), *gate.feed(data[cut:])])
    (_, exited) = (proto.decode_event(frame) for frame in Decoder().receive(out))
    assert isinstance(exited, proto.Exited)
    assert (exited.status, exited.timed_out, exited.max_rss, exited.oom_killed) == (-9, True, 7, killed)
    with pytest.raises(FrameError):
        list(Downward(ME, lambda: True).feed(encode(proto.Reply.EXITED, b"\0", exec_id=ME)))


@pytest.mark.parametrize(
    "frame",
    [
        encode(proto.Reply.DATA, b"12345678x", stream=1, exec_id=OTHER),
        encode(proto.Reply.RANGE, b"", stream=1, exec_id=ME),
        encode(proto.Reply.EXECS, b"", req=1),
        encode(proto.Reply.OK, b"", req=0),
        encode(99, b"", exec_id=ME),
    ],
)
def test_an_agent_that_speaks_of_something_else_is_cut_off(frame: bytes) -> None:
    with pytest.raises(FrameError):
        list(Downward(ME).feed(frame))


def test_after_a_turn_only_the_new_execution_counts_and_late_words_about_the_one_before_are_dropped() -> None:
    gate, late = Downward(ME), encode(proto.Reply.STDIN_CLOSED, b"", exec_id=ME)
    gate.turn(OTHER)
    data = encode(proto.Reply.DATA, b"12345678x", stream=1, exec_id=OTHER)
    answer = encode(proto.Reply.OK, b"", req=3)
    assert b"".join(gate.feed(late + data + late + answer)) == data + answer
    up = Upward(ME, HELLO)
    up.turn(OTHER)
    assert up.feed(proto.ack(OTHER, 1, 5))[0] == proto.ack(OTHER, 1, 5)
    with pytest.raises(FrameError):
        up.feed(proto.ack(ME, 1, 5))


CONTENT = random.Random(1).randbytes(WINDOW)


class Memory:
    """Shared memory of the relay."""

    def __init__(self) -> None:
        self.counted = 0
        self.answers: list[tuple[int, int, bytes]] = []
        self.bytes = memoryview(CONTENT)

    def count(self, stream: int, length: int) -> None:
        self.counted += length

    def answered(self, type: int, req: int, payload: bytes) -> None:
        self.answers.append((type, req, payload))

    def pieces(self, stream: int, position: int, length: int) -> Iterator[tuple[int, memoryview]]:
        for end, start, stop in _wrapped(position, length):
            yield end, self.bytes[start:stop]


def _wrapped(position: int, length: int) -> list[tuple[int, int, int]]:
    if length > WINDOW:
        raise FrameError("more than the window")
    offset = position % WINDOW
    first = min(length, WINDOW - offset)
    pieces = [(position + first, offset, offset + first)]
    return pieces if first == length else [*pieces, (position + length, 0, length - first)]


def shared(position: int, length: int, exec_id: str = ME) -> bytes:
    """The agent's word that so much stands in the shared memory."""
    return encode(proto.Reply.RANGE, struct.pack("<QI", position, length), stream=1, exec_id=exec_id)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, WINDOW)), max_size=8),
    st.integers(0, 1 << 40),
    st.lists(st.integers(0, 1 << 20)),
)
def test_shared_output_goes_on_in_frames_among_the_others_however_it_is_cut(
    outputs: list[tuple[bool, int]], start: int, cuts: list[int]
) -> None:
    memory, data, position = Memory(), b"", start
    for in_memory, length in outputs:
        if in_memory:
            data += shared(position, length)
        else:
            length //= 100
            content = b"".join(memory.bytes[a:b] for _, a, b in _wrapped(position, length))
            data += encode(proto.Reply.DATA, struct.pack("<Q", position) + content, stream=1, exec_id=ME)
        position += length
    gate, decoder = Downward(ME, shared=memory), Decoder()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    reached = start
    for a, b in itertools.pairwise(edges):
        for message in gate.feed(data[a:b]):
            assert len(message) <= MAX_MESSAGE
            frames = decoder.receive(message)
            assert sum(24 + len(frame.payload) for frame in frames) == len(message), "not a whole number of frames"
            for frame in frames:
                event = proto.decode_event(frame)
                assert isinstance(event, proto.Data) and (event.stream, event.position) == (1, reached)
                assert len(event.data) <= 256 * 1024
                expected = b"".join(memory.bytes[x:y] for _, x, y in _wrapped(reached, len(event.data)))
                assert event.data == expected
                reached += len(event.data)
    assert reached == position


def test_the_answer_to_the_relay_is_kept_from_the_watcher() -> None:
    memory, number = Memory(), OWN_REQUESTS[0]
    passed = encode(proto.Reply.SHM_OK, struct.pack("<I", WINDOW), stream=1, req=number, exec_id=ME)
    refused = encode(proto.Reply.FAILED, struct.pack("<HH", 4, 0), req=number + 1, exec_id=ME)
    own = encode(proto.Reply.OK, b"", req=3)
    assert b"".join(Downward(ME, shared=memory).feed(passed + own + refused)) == own
    assert memory.answers == [
        (proto.Reply.SHM_OK, number, struct.pack("<I", WINDOW)),
        (proto.Reply.FAILED, number + 1, struct.pack("<HH", 4, 0)),
    ]


@pytest.mark.parametrize(
    "frame",
    [
        shared(0, WINDOW + 1),
        shared(2**64 - 10, 20),
        shared(0, 5, OTHER),
        encode(proto.Reply.RANGE, b"short", stream=1, exec_id=ME),
        encode(proto.Reply.SHM_OK, struct.pack("<I", WINDOW), stream=1, req=7, exec_id=ME),
    ],
)
def test_an_agent_that_lies_about_shared_memory_is_cut_off(frame: bytes) -> None:
    with pytest.raises(FrameError):
        list(Downward(ME, shared=Memory()).feed(frame))


def test_few_words_about_much_memory_are_worked_off_one_message_after_the_other() -> None:
    messages = Downward(ME, shared=Memory()).feed(shared(0, WINDOW) * 10_000)
    assert all(len(message) <= MAX_MESSAGE for message in itertools.islice(messages, 20))


def test_after_a_turn_late_shared_output_of_the_one_before_is_dropped() -> None:
    gate = Downward(ME, shared=Memory())
    gate.turn(OTHER)
    assert b"".join(gate.feed(shared(0, 10))) == b""
