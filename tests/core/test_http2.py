"""HTTP/2 from in the middle: real clients and servers (h2) with the relay between them, however the bytes are cut."""

from __future__ import annotations

import os

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes
from hpack import Encoder, NeverIndexedHeaderTuple
from hyperframe.frame import ContinuationFrame, GoAwayFrame, HeadersFrame, SettingsFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.core.http2 import BrokenError, Fields, Relay, Side
from hutch.core.secrets import Substitution, substitute_fields

VALUE = b"tr3asure"
MARK = b"<HUTCH_SECRET:KEY>"
GET: Fields = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"good.test"), (b":path", b"/")]
POST: Fields = [(b":method", b"POST"), *GET[1:]]


class Middle:
    """A client, the relay, a server."""

    def __init__(self, piece: int = 1 << 20) -> None:
        self.relay = Relay(self.rewrite)
        self.value = VALUE
        self.client = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self.server = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self.seen: tuple[list[Event], list[Event]] = ([], [])  # by the client, by the server
        self.wire = bytearray()  # what the server got
        self.more = b""  # what the client says beside
        self.piece = piece
        self.takes = True  # whether the server and the client give back what they were sent
        self.client.initiate_connection()
        self.server.initiate_connection()
        self.run()

    def rewrite(self, fields: Fields) -> Fields:
        """For good.test alone."""
        if (b":authority", b"good.test") not in fields:
            raise ValueError("another host")
        return substitute_fields(fields, [Substitution(MARK, self.value)])

    def run(self) -> None:
        """Let bytes flow until nobody has any."""
        while True:
            moved = self._between(Side.BOX, self.client) + self._between(Side.PEER, self.server)
            if not moved:
                return

    def _between(self, side: Side, end: H2Connection) -> int:
        said = end.data_to_send()
        if side is Side.BOX:
            said, self.more = said + self.more, b""
        for start in range(0, len(said), self.piece):
            self.relay.receive(side, said[start : start + self.piece])
        heard = self.relay.take(side)
        if side is Side.PEER:
            self.wire += heard
        for start in range(0, len(heard), self.piece):
            for event in end.receive_data(heard[start : start + self.piece]):
                self.seen[side].append(event)
                if isinstance(event, DataReceived) and self.takes:
                    end.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        return len(said) + len(heard)

    def requests(self) -> list[RequestReceived]:
        return [event for event in self.seen[Side.PEER] if isinstance(event, RequestReceived)]

    def of(self, side: Side, kind: type[Event]) -> list[Event]:
        return [event for event in self.seen[side] if isinstance(event, kind)]

    def body(self, side: Side, stream: int) -> bytes:
        events = self.seen[side]
        return b"".join(e.data for e in events if isinstance(e, DataReceived) and e.stream_id == stream)


def test_a_request_and_its_answer() -> None:
    middle = Middle()
    middle.client.send_headers(1, [*POST, (b"te", b"trailers")])
    middle.client.send_data(1, b"question", pad_length=20)
    middle.client.send_headers(1, [(b"after", b"all")], end_stream=True)
    middle.run()
    assert (b"te", b"trailers") in middle.requests()[0].headers
    assert middle.body(Side.PEER, 1) == b"question"
    middle.server.send_headers(1, [(b":status", b"103"), (b"link", b"</x>")])
    middle.server.send_headers(1, [(b":status", b"200")])
    middle.server.send_data(1, b"answer")
    middle.server.send_headers(1, [(b"grpc-status", b"0")], end_stream=True)
    middle.run()
    assert middle.body(Side.BOX, 1) == b"answer"
    for side, trailer in ((Side.PEER, (b"after", b"all")), (Side.BOX, (b"grpc-status", b"0"))):
        (trailers,) = middle.of(side, TrailersReceived)
        assert isinstance(trailers, TrailersReceived) and trailer in trailers.headers
        assert len(middle.of(side, StreamEnded)) == 1
    assert len(middle.of(Side.BOX, InformationalResponseReceived)) == 1


def test_the_end_comes_with_the_headers() -> None:
    """Servers may take a request whose end comes later for one with a body; 304 has a length and no body."""
    middle = Middle()
    middle.client.send_headers(1, GET, end_stream=True)
    middle.run()
    assert middle.requests()[0].stream_ended is not None
    middle.server.send_headers(1, [(b":status", b"304"), (b"content-length", b"5")], end_stream=True)
    middle.run()
    (answer,) = middle.of(Side.BOX, ResponseReceived)
    assert isinstance(answer, ResponseReceived) and answer.stream_ended is not None


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from([b"x-a", b"x-b", b"cookie"]), st.lists(st.sampled_from([MARK, b"word", b"<"])))),
    st.lists(st.sampled_from([MARK, b"%3CHUTCH_SECRET%3AKEY%3E", b"a=b&"])),
    st.lists(st.sampled_from([MARK, MARK[:7], MARK[7:], b"x" * 300])),
    st.integers(1, 300),
)
def test_values_go_into_headers_and_queries_alone(
    headers: list[tuple[bytes, list[bytes]]], query: list[bytes], body: list[bytes], piece: int
) -> None:
    """However headers, body and bytes are cut."""
    middle = Middle(piece)
    fields = [(name, b"v" + b"".join(words)) for name, words in headers]
    path = b"/" + MARK + b"?" + b"".join(query)
    middle.client.send_headers(1, [*POST[:3], (b":path", path), *fields])
    for part in body:
        middle.client.send_data(1, part)
        middle.run()
    middle.client.send_headers(1, [(b"x-after", MARK)], end_stream=True)
    middle.run()
    got = middle.requests()[0].headers
    expected = b"/" + MARK + b"?" + b"".join(query).replace(MARK, VALUE).replace(b"%3CHUTCH_SECRET%3AKEY%3E", VALUE)
    assert (b":path", expected) in got
    for name in (b"x-a", b"x-b"):
        assert [v for n, v in got if n == name] == [v.replace(MARK, VALUE) for n, v in fields if n == name]
    assert middle.body(Side.PEER, 1) == b"".join(body)
    (trailers,) = middle.of(Side.PEER, TrailersReceived)
    assert isinstance(trailers, TrailersReceived) and trailers.headers == [(b"x-after", MARK)]


def test_headers_in_several_frames() -> None:
    middle = Middle()
    filling = os.urandom(15000).hex().encode()
    middle.client.send_headers(1, [*GET, (b"x-long", filling + MARK + filling)], end_stream=True)
    middle.run()
    assert (b"x-long", filling + VALUE + filling) in middle.requests()[0].headers


def test_no_table_holds_a_value() -> None:
    middle = Middle()
    middle.client.send_headers(
        1, [*GET[:3], (b":path", b"/?" + MARK), (b"x-key", MARK), (b"x-own", b"1")], end_stream=True
    )
    middle.run()
    marked = {field[0] for field in middle.requests()[0].headers if isinstance(field, NeverIndexedHeaderTuple)}
    assert marked == {b":path", b"x-key"}


def test_a_request_for_another_host_ends_it() -> None:
    middle = Middle()
    middle.client.send_headers(1, [*GET[:2], (b":authority", b"other.test"), (b":path", b"/")], end_stream=True)
    with pytest.raises(BrokenError, match="another host") as caught:
        middle.run()
    assert caught.value.side is Side.BOX and not caught.value.malformed
    events = middle.client.receive_data(middle.relay.take(Side.BOX))
    assert any(isinstance(event, ResponseReceived) and (b":status", b"403") in event.headers for event in events)
    assert any(isinstance(event, DataReceived) and event.data == b"hutch: another host\n" for event in events)
    assert any(isinstance(event, ConnectionTerminated) for event in events)
    assert not middle.requests()


def test_stalled_streams_hold_up_no_other_and_little_is_held() -> None:
    middle = Middle()
    middle.takes = False
    sent = 0
    for number in (1, 3, 5):
        middle.client.send_headers(number, POST)
    middle.run()
    for number in (1, 3):
        while room := min(middle.client.local_flow_control_window(number), 16384):
            middle.client.send_data(number, b"x" * room)
            middle.run()
            sent += room
    # The server takes no more than the windows that it announced, the relay no more than those that it did.
    passed = len(middle.body(Side.PEER, 1)) + len(middle.body(Side.PEER, 3))
    assert passed == 65535 and sent - passed <= 2 * 256 * 1024
    middle.server.increment_flow_control_window(16384)
    middle.client.send_data(5, b"quick", end_stream=True)
    middle.run()
    assert middle.client.local_flow_control_window(5) > 100_000
    middle.server.increment_flow_control_window(1 << 20)
    for number in (1, 3):
        middle.server.increment_flow_control_window(1 << 20, number)
    middle.run()
    assert middle.body(Side.PEER, 5) == b"quick"
    assert len(middle.body(Side.PEER, 1)) + len(middle.body(Side.PEER, 3)) == sent


def test_much_data_both_ways() -> None:
    """More than all windows together: what was taken is given back."""
    middle = Middle()
    middle.client.send_headers(1, POST)
    middle.run()
    middle.server.send_headers(1, [(b":status", b"200")])
    middle.run()
    for end, side in ((middle.client, Side.PEER), (middle.server, Side.BOX)):
        for _ in range(300):
            end.send_data(1, b"y" * 16000)
            middle.run()
        end.end_stream(1)
        middle.run()
        assert len(middle.body(side, 1)) == 300 * 16000 and middle.of(side, StreamEnded)


def test_resets_pass_both_ways_and_give_room_back() -> None:
    middle = Middle()
    middle.takes = False
    for number in range(1, 161, 2):
        middle.client.send_headers(number, POST)
        middle.run()
        for _ in range(8):
            if (room := middle.client.local_flow_control_window(number)) >= 16384:
                middle.client.send_data(number, b"z" * min(room, 16384))
        middle.run()
        if number % 4 == 1:
            middle.client.reset_stream(number, ErrorCodes.CANCEL)
        else:
            middle.server.reset_stream(number, ErrorCodes.ENHANCE_YOUR_CALM)
        middle.run()
    seen = [[e.error_code for e in middle.of(side, StreamReset) if isinstance(e, StreamReset)] for side in Side]
    assert seen == [[ErrorCodes.ENHANCE_YOUR_CALM] * 40, [ErrorCodes.CANCEL] * 40]


def test_an_early_answer_arrives_before_the_reset() -> None:
    middle = Middle()
    middle.client.send_headers(1, POST)
    middle.run()
    middle.server.send_headers(1, [(b":status", b"413")])
    middle.server.send_data(1, b"too long", end_stream=True)
    middle.server.reset_stream(1, ErrorCodes.NO_ERROR)
    middle.run()
    assert middle.body(Side.BOX, 1) == b"too long"
    assert [type(e) for e in middle.seen[Side.BOX]][-2:] == [StreamEnded, StreamReset]


def test_a_peer_that_leaves_answers_what_it_took() -> None:
    middle = Middle()
    for number in (1, 3):
        middle.client.send_headers(number, GET, end_stream=True)
    middle.run()
    middle.relay.receive(Side.PEER, GoAwayFrame(0, last_stream_id=1, error_code=0).serialize())
    middle.server.send_headers(1, [(b":status", b"200")])
    middle.server.send_data(1, b"last", end_stream=True)
    assert not middle.relay.is_over
    middle.relay.receive(Side.PEER, middle.server.data_to_send())
    assert middle.relay.is_over
    said = middle.relay.take(Side.BOX)
    goaway = GoAwayFrame(0, last_stream_id=3).serialize()
    assert said.endswith(goaway)
    events = middle.client.receive_data(said[: -len(goaway)])
    assert [e.error_code for e in events if isinstance(e, StreamReset)] == [ErrorCodes.REFUSED_STREAM]
    assert [e.data for e in events if isinstance(e, DataReceived)] == [b"last"]


def test_a_peer_that_ends() -> None:
    middle = Middle()
    for number in (1, 3):
        middle.client.send_headers(number, GET, end_stream=True)
    middle.run()
    middle.server.send_headers(1, [(b":status", b"200")])
    middle.run()
    middle.relay.peer_ended()
    assert middle.relay.is_over
    events = middle.client.receive_data(
        middle.relay.take(Side.BOX).removesuffix(GoAwayFrame(0, last_stream_id=3).serialize())
    )
    assert [e.error_code for e in events if isinstance(e, StreamReset)] == [ErrorCodes.INTERNAL_ERROR] * 2


def test_a_peer_that_takes_few_streams() -> None:
    middle = Middle()
    middle.server.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
    for number in (1, 3):
        middle.client.send_headers(number, GET, end_stream=True)
    middle.relay.receive(Side.PEER, middle.server.data_to_send())
    middle.run()
    (reset,) = middle.of(Side.BOX, StreamReset)
    assert isinstance(reset, StreamReset) and reset.error_code == ErrorCodes.REFUSED_STREAM
    assert middle.client.remote_settings.max_concurrent_streams == 1


# What hostile boxes do.


def _headers(stream: int, block: bytes, *flags: str) -> bytes:
    frame = HeadersFrame(stream, block)
    for flag in flags:
        frame.flags.add(flag)
    return frame.serialize()


def test_a_header_bomb() -> None:
    """Few bytes that stand for many."""
    middle = Middle()
    encoder = Encoder()
    block = encoder.encode([*GET, (b"x-long", b"v" * 4000)]) + encoder.encode([(b"x-long", b"v" * 4000)]) * 30
    assert len(block) < 8000
    middle.more = _headers(1, block, "END_HEADERS", "END_STREAM")
    with pytest.raises(BrokenError, match="malformed"):
        middle.run()
    assert not middle.requests()


def test_values_that_make_headers_too_long() -> None:
    """Few bytes of a box would make the gateway write many."""
    middle = Middle()
    middle.client.send_headers(1, [*GET, *((b"x-key", MARK * 400) for _ in range(8))], end_stream=True)
    middle.run()
    assert len(middle.requests()) == 1
    middle.value = VALUE * 10
    middle.client.send_headers(3, [*GET, *((b"x-key", MARK * 400) for _ in range(8))], end_stream=True)
    with pytest.raises(BrokenError, match="longer than"):
        middle.run()
    assert len(middle.requests()) == 1


@pytest.mark.parametrize("size", [0, 16000])
def test_endless_headers(size: int) -> None:
    middle = Middle()
    middle.more = _headers(1, b"\x82") + ContinuationFrame(1, b"\0" * size).serialize() * 100
    with pytest.raises(BrokenError, match="malformed"):
        middle.run()


def test_requests_that_are_broken_off_at_once() -> None:
    middle = Middle()
    with pytest.raises(BrokenError, match="breaks off"):
        for number in range(1, 1001, 2):
            middle.client.send_headers(number, GET, end_stream=True)
            middle.client.reset_stream(number)
            middle.run()
    assert len(middle.requests()) <= 201


def test_too_many_streams() -> None:
    middle = Middle()
    with pytest.raises(BrokenError, match="malformed"):
        for number in range(1, 300, 2):
            middle.more += _headers(number, Encoder().encode(GET), "END_HEADERS")
        middle.run()
    assert len(middle.requests()) <= 100


def test_settings_without_end() -> None:
    middle = Middle()
    middle.more = SettingsFrame(0, {SettingsFrame.HEADER_TABLE_SIZE: 1 << 30}).serialize() * 200
    with pytest.raises(BrokenError, match="settings"):
        middle.run()


def test_a_table_for_headers_stays_small() -> None:
    middle = Middle()
    middle.client.update_settings({SettingCodes.HEADER_TABLE_SIZE: 1 << 30})
    middle.run()
    for number in range(1, 41, 2):
        middle.client.send_headers(number, GET, end_stream=True)
        middle.run()
        middle.server.send_headers(number, [(b":status", b"200"), (b"x", b"%d" % number * 1000)], end_stream=True)
        middle.run()
    assert middle.client.decoder.header_table_size == 4096


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: good.test\r\n\r\n",
        b"\0\x50\0\0\0\0\0\0\1" + b"x" * 9,  # longer than any frame may be
        _headers(1, b"\x82") + b"\0\0\0\x06\0\0\0\0\0",  # something between headers and the rest of them
        ContinuationFrame(1, b"\x82").serialize(),
        _headers(2, b"\x82", "END_HEADERS"),
        _headers(1, b"\xff\xff\xff\xff", "END_HEADERS"),
    ],
)
def test_malformed(said: bytes) -> None:
    middle = Middle()
    if said.startswith(b"GET"):
        middle.relay = Relay(middle.rewrite)
    with pytest.raises(BrokenError, match="malformed") as caught:
        middle.relay.receive(Side.BOX, said)
    assert caught.value.side is Side.BOX and caught.value.malformed


def test_no_pushes() -> None:
    middle = Middle()
    middle.client.send_headers(1, GET, end_stream=True)
    middle.run()
    assert middle.server.remote_settings.enable_push == 0


@settings(deadline=None)
@given(st.binary(max_size=400), st.sampled_from(list(Side)))
def test_whatever_a_side_says(said: bytes, side: Side) -> None:
    middle = Middle()
    try:
        middle.relay.receive(side, said)
    except BrokenError as error:
        assert error.side is side
