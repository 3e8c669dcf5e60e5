"""The agent protocol at the host: what is sent, and that nothing an agent sends raises anything but `FrameError`."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.core import agentproto as proto
from hutch.core.frames import Decoder, Frame, FrameError

frames = st.builds(
    Frame,
    type=st.one_of(st.integers(0, 255), st.sampled_from([int(r) for r in proto.Reply])),
    stream=st.integers(0, 2),
    req=st.integers(0, 2**32 - 1),
    exec_id=st.sampled_from(["", "abc", "A" * 12]),
    payload=st.one_of(st.binary(max_size=100), st.integers(0, 6).map(lambda n: bytes(40 * n))),
)


@given(frames)
def test_decoding_never_raises_anything_but_frame_error(frame: Frame) -> None:
    for decode in (proto.decode_answer, proto.decode_event):
        with contextlib.suppress(FrameError):
            decode(frame)


def only(wire: bytes) -> Frame:
    (frame,) = Decoder().receive(wire)
    return frame


def attributes(payload: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(payload):
        tag, zero, length = struct.unpack_from("<HHI", payload, at)
        assert zero == 0
        found.append((tag, payload[at + 8 : at + 8 + length]))
        at += 8 + length
    return found


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def test_start_carries_everything() -> None:
    frame = only(
        proto.start(
            "abc", ["echo", "é\udcff"], req=9, env={"A": "1=2"}, cwd="/x", user="u:g",
            tty=(50, 132), stdin=True, main=True,
            watch=True,            timeout=1.5, kill_after=0.25, linger=None, file_op=proto.FileOp.PUT, path="/p",
        )
    )  # fmt: skip
    assert (frame.type, frame.req, frame.exec_id) == (proto.Request.START, 9, "abc")
    assert attributes(frame.payload) == [
        (1, b"echo"), (1, b"\xc3\xa9\xff"), (2, b"A=1=2"), (3, b"/x"), (4, b"u:g"), (5, struct.pack("<HH", 50, 132)),
        (6, struct.pack("<I", 7)), (7, u64(1500)), (8, u64(250)), (9, u64(2**64 - 1)), (11, b"\x02/p"),
    ]  # fmt: skip


@pytest.mark.parametrize(("timeout", "sent"), [(None, []), (0, []), (0.0, []), (0.0001, [u64(1)]), (2, [u64(2000)])])
def test_start_without_a_timeout_sends_none(timeout: float | None, sent: list[bytes]) -> None:
    frame = only(proto.start("a", ["x"], req=1, env={}, timeout=timeout))
    assert [value for tag, value in attributes(frame.payload) if tag == 7] == sent


def test_attach_names_only_the_streams_that_it_is_given() -> None:
    assert only(proto.attach("a", {1: 5, 2: 7}, req=1)).payload == b"\x03" + u64(5) + u64(7)
    assert only(proto.attach("a", {2: 7}, req=1)).payload == b"\x02" + u64(0) + u64(7)
    assert only(proto.attach("a", {}, req=1)).payload == b"\x00" + u64(0) + u64(0)
    assert only(proto.detach("a", [1, 2])).payload == b"\x03"
    ack = only(proto.ack("a", 2, 99))
    assert (ack.stream, ack.payload, ack.req) == (2, u64(99), 0)


def event(kind: int, payload: bytes, *, stream: int = 1) -> proto.Event:
    return proto.decode_event(Frame(kind, stream, 0, "abc", payload))


def test_events_have_their_values() -> None:
    reply = proto.Reply
    assert event(reply.DATA, u64(5) + b"xyz") == proto.Data(1, 5, b"xyz")
    assert event(reply.RANGE, u64(5) + struct.pack("<I", 9), stream=2) == proto.Range(2, 5, 9)
    assert event(reply.GAP, u64(5) + u64(9)) == proto.Gap(1, 5, 9)
    assert event(reply.EOF, u64(5) + b"\x01") == proto.Eof(1, 5, True)
    assert event(reply.STDIN_CREDIT, struct.pack("<I", 7), stream=0) == proto.StdinCredit(7)
    assert event(reply.STDIN_CLOSED, b"", stream=0) == proto.StdinClosed()
    exited = struct.pack("<iBxxxQQQQ", -9, 1, 2_000_000_000, 3_000_000, 4_000_000, 5)
    assert event(reply.EXITED, exited, stream=0) == proto.Exited(-9, True, 2.0, 3.0, 4.0, 5)


@pytest.mark.parametrize(
    ("kind", "payload", "stream"),
    [
        (proto.Reply.GAP, u64(9) + u64(5), 1),
        (proto.Reply.DATA, b"short", 1),
        (proto.Reply.DATA, u64(0), 0),
        (proto.Reply.EOF, u64(0), 1),
        (proto.Reply.EXITED, b"", 0),
        (79, b"", 1),
        (99, b"", 1),
    ],
)
def test_malformed_events_are_refused(kind: int, payload: bytes, stream: int) -> None:
    with pytest.raises(FrameError):
        event(kind, payload, stream=stream)


def test_an_event_without_its_execution_is_refused() -> None:
    with pytest.raises(FrameError):
        proto.decode_event(Frame(proto.Reply.DATA, 1, 0, "", u64(0) + b"x"))


def test_answers() -> None:
    def answer(kind: int, payload: bytes) -> proto.Answer | None:
        return proto.decode_answer(Frame(kind, 0, 1, "", payload))

    reply = proto.Reply
    assert answer(reply.HELLO_OK, struct.pack("<IIII", 1, 524288, 1, 1500)) == proto.Hello(1, 524288, True, 1.5)
    assert answer(reply.STARTED, struct.pack("<I", 7)) == proto.Started(7)
    assert answer(reply.ATTACHED, struct.pack("<IBxxxQ", 65536, 1, 7)) == proto.Attached(65536, True, 7)
    assert answer(reply.FAILED, struct.pack("<HH", 16, 2) + b"no\xff") == proto.Failed(16, 2, "no\ufffd")
    assert answer(reply.OK, b"") == proto.Ok()
    record = struct.pack("<12sBBHIiQQ", b"main", 1, 0b1101, 0, 7, -15, 10**9, 2 * 10**9)
    assert answer(reply.EXECS, record) == proto.Execs(
        (proto.ExecRecord("main", True, True, True, True, 7, -15, 1.0, 2.0),)
    )
    assert answer(reply.DATA, b"") is None
    for kind, payload in (
        (reply.HELLO_OK, struct.pack("<IIII", 1, 1, 0, 0)),
        (reply.EXECS, b"x"),
        (reply.STARTED, b""),
    ):
        with pytest.raises(FrameError):
            answer(kind, payload)
