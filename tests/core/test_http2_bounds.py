"""HTTP/2 from in the middle: what is held for a side that takes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from h2.events import StreamEnded
from h2.settings import SettingCodes
from hpack import Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.core.http2 import BrokenError, Relay, Side
from tests.core.test_http2 import GET, POST, Middle

if TYPE_CHECKING:
    from h2.connection import H2Connection

MOST = 1 << 20
PIECE = 4096
"""What the gateway hands over at once: so much can come on top."""


def _answered(middle: Middle, path: bytes = b"/") -> None:
    """A request whose answer has begun."""
    middle.client.send_headers(1, [*GET[:3], (b":path", path)], end_stream=True)
    middle.run()
    middle.server.send_headers(1, [(b":status", b"200")])
    middle.run()


def _wide(end: H2Connection) -> None:
    """Let an end take everything that is sent to it, as far as HTTP/2 knows."""
    end.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: (1 << 31) - 1})
    end.increment_flow_control_window((1 << 31) - 1 - 65535)


def test_data_that_nobody_takes_waits_in_the_windows() -> None:
    """Although the side gave room for all of it. The other is not asked for more, and all arrives later."""
    middle = Middle()
    _wide(middle.client)
    _answered(middle)
    sent = 0
    while room := min(middle.server.local_flow_control_window(1), 16384):
        middle.server.send_data(1, b"y" * room)
        middle.relay.receive(Side.PEER, middle.server.data_to_send())
        middle.server.receive_data(middle.relay.take(Side.PEER))
        sent += room
    assert 256 << 10 < sent < 512 << 10
    middle.run()
    assert middle.body(Side.BOX, 1) == b"y" * sent
    assert middle.server.local_flow_control_window(1) > 100_000


def test_what_one_side_does_not_take_keeps_no_other_stream_from_the_other() -> None:
    """A request goes on, with its body, while nothing of an answer is taken."""
    middle = Middle()
    _wide(middle.client)
    _answered(middle)
    while room := min(middle.server.local_flow_control_window(1), 16384):
        middle.server.send_data(1, b"y" * room)
        middle.relay.receive(Side.PEER, middle.server.data_to_send())
        middle.server.receive_data(middle.relay.take(Side.PEER))
    middle.client.send_headers(3, POST)
    for _ in range(12):
        middle.client.send_data(3, b"z" * 16384)
    middle.client.end_stream(3)
    middle.relay.receive(Side.BOX, middle.client.data_to_send())
    while data := middle.relay.take(Side.PEER):
        for event in middle.server.receive_data(data):
            middle.seen[Side.PEER].append(event)
            if flow := getattr(event, "flow_controlled_length", 0):
                middle.server.acknowledge_received_data(flow, 3)
        middle.relay.receive(Side.PEER, middle.server.data_to_send())
    assert middle.body(Side.PEER, 3) == b"z" * 12 * 16384
    assert [event.stream_id for event in middle.seen[Side.PEER] if isinstance(event, StreamEnded)] == [1, 3]


def _flood(relay: Relay, side: Side, piece: bytes) -> BrokenError:
    """Say the same again and again, take nothing, and return how it ends."""
    for _ in range(4 * MOST // 13):
        try:
            relay.receive(side, piece)
        except BrokenError as error:
            return error
    pytest.fail("it never ends")


@pytest.mark.parametrize("side", list(Side))
def test_pings_whose_answers_are_not_taken(side: Side) -> None:
    middle = Middle()
    error = _flood(middle.relay, side, PingFrame(0, b"12345678").serialize() * 100)
    assert error.side is side and "does not take" in str(error)
    assert len(middle.relay.take(side)) <= MOST + PIECE


def test_pings_whose_answers_are_taken() -> None:
    """The control."""
    middle = Middle()
    for _ in range(650):
        middle.relay.receive(Side.BOX, PingFrame(0, b"12345678").serialize() * 100)
        assert middle.relay.take(Side.BOX)


def test_data_for_streams_that_were_reset() -> None:
    """Each is answered by a reset."""
    middle = Middle()
    middle.client.send_headers(1, POST)
    middle.run()
    middle.server.reset_stream(1)
    middle.run()
    error = _flood(middle.relay, Side.BOX, DataFrame(1, b"").serialize() * 200)
    assert error.side is Side.BOX
    assert len(middle.relay.take(Side.BOX)) <= MOST + PIECE


def test_heads_of_answers_that_are_not_taken() -> None:
    """A peer may say what is to come as often as it likes."""
    middle = Middle()
    middle.client.send_headers(1, GET, end_stream=True)
    middle.run()
    with pytest.raises(BrokenError, match="does not take") as caught:
        for number in range(MOST // 1000):
            head = HeadersFrame(1, Encoder().encode([(b":status", b"103"), (b"link", b"%04d" % number + b"{" * 1000)]))
            head.flags.add("END_HEADERS")
            middle.relay.receive(Side.PEER, head.serialize())
    assert caught.value.side is Side.BOX
    assert len(middle.relay.take(Side.BOX)) <= MOST + PIECE


def test_heads_of_requests_that_are_not_taken() -> None:
    middle = Middle()
    with pytest.raises(BrokenError, match="does not take") as caught:
        for number in range(1, 200, 2):
            middle.client.send_headers(number, [*GET, (b"x-long", b"%03d" % number + b"{" * 8000)], end_stream=True)
            said = middle.client.data_to_send()
            for start in range(0, len(said), PIECE):
                middle.relay.receive(Side.BOX, said[start : start + PIECE])
    assert caught.value.side is Side.PEER
    assert len(middle.relay.take(Side.PEER)) <= MOST + (64 << 10)


def test_a_request_of_the_host() -> None:
    """Which nobody is to answer, and least of all as if the box had made it."""
    middle = Middle()
    head = HeadersFrame(2, Encoder().encode([*GET, (b"x-key", b"<HUTCH_SECRET:KEY>")]))
    head.flags.add("END_HEADERS")
    with pytest.raises(BrokenError, match="a request") as caught:
        middle.relay.receive(Side.PEER, head.serialize())
    assert caught.value.side is Side.PEER
    assert not middle.relay.requests and b"tr3asure" not in middle.relay.take(Side.PEER)


def _frames() -> st.SearchStrategy[bytes]:
    stream = st.integers(0, 9)
    heads = st.sampled_from([GET, POST, [(b":status", b"200")], [(b":status", b"103")], [(b"after", b"all")]])

    def made(frame: Frame, flags: set[str]) -> bytes:
        for flag in flags & {flag.name for flag in frame.defined_flags} - {"PADDED", "PRIORITY"}:
            frame.flags.add(flag)
        return frame.serialize()

    flags = st.sets(st.sampled_from(["END_STREAM", "END_HEADERS", "ACK"])).map(lambda some: some | {"END_HEADERS"})
    return st.one_of(
        st.builds(lambda n, h, f: made(HeadersFrame(n or 1, Encoder().encode(h)), f), stream, heads, flags),
        st.builds(lambda n, size, f: made(DataFrame(n or 1, b"d" * size), f), stream, st.integers(0, 16384), flags),
        st.builds(lambda n: RstStreamFrame(n or 1, 8).serialize(), stream),
        st.builds(lambda n, size: WindowUpdateFrame(n, size).serialize(), stream, st.integers(1, (1 << 31) - 1)),
        st.builds(lambda size: SettingsFrame(0, {4: size}).serialize(), st.integers(0, (1 << 31) - 1)),
        st.builds(lambda: PingFrame(0, b"12345678").serialize()),
        st.builds(lambda n: PriorityFrame(n or 1, depends_on=0, stream_weight=3).serialize(), stream),
    )


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(list(Side)), _frames(), st.sampled_from([None, *Side])), max_size=40))
def test_whatever_the_sides_say_and_take(said: list[tuple[Side, bytes, Side | None]]) -> None:
    """It goes on or ends in order, and little is held: never does it fail in another way."""
    middle = Middle()
    taken = [0, 0]
    try:
        for side, data, taker in said:
            middle.relay.receive(side, data)
            if taker is not None:
                taken[taker] = len(middle.relay.take(taker))
        middle.relay.peer_ended()
    except BrokenError:
        pass
    for side in Side:
        assert max(taken[side], len(middle.relay.take(side))) < MOST
        middle.relay.take(side)
