"""HTTP/2 between a box and one host of its secrets, from in the middle: two connections, whose streams are joined.

Bytes of either side go in by `Relay.receive`, bytes for either side come out by `Relay.take`; no I/O. Headers are read
and written anew, since their compression belongs to one connection; the head of a request may be refused or changed,
everything else passes as it is. A side gets back the room for what it sent when the other has taken it, and data waits
in its stream while much else is to be taken: so the windows bound what is held here, and a stream whose data nobody
takes holds up none of the others until there are seven of it. What no window bounds (heads, and what a side must be
told about what it did itself) has a bound of its own.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Any, TypeAlias

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    InformationalResponseReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

from hutch.core.http2frames import ACK, FRAME_BYTES, GOAWAY, SETTINGS, Cutter, Frame, FrameError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Fields: TypeAlias = list[tuple[bytes, bytes]]
"""Headers, those that begin with a colon first."""

_STREAM_WINDOW = 256 * 1024
_CONNECTION_WINDOW = 7 * _STREAM_WINDOW
_FIRST_WINDOW = 65535
_MOST_STREAMS = 100
_HEADER_BYTES = 64 * 1024
_TABLE_BYTES = 4096
_FIELD_BYTES = 32  # what each header counts for beside its own length (RFC 9113, 10.5.1)
# A box that begins requests only to break them off, or a side that keeps changing its settings, is given up.
_MOST_ABANDONED = 200
_MOST_SETTINGS = 100
# So much data, at most, waits to be taken beside what has no window; and so much of all, before a side that takes none
# of it is given up.
_QUEUE_BYTES = 128 * 1024
_MOST_BYTES = 1024 * 1024


class Side(enum.IntEnum):
    """One of the two connections."""

    BOX = 0
    PEER = 1

    @property
    def other(self) -> Side:
        """The other one."""
        return Side(1 - self)


class BrokenError(Exception):
    """A side did what it must not, and the conversation is over. ``malformed``: it is not a request that was refused,
    but not HTTP/2. `Relay.take` may have something left that tells the side."""

    def __init__(self, side: Side, reason: str, *, malformed: bool = False) -> None:
        super().__init__(reason)
        self.side = side
        self.malformed = malformed


class _Way:
    """What a side says on one stream: data that the other has no room for yet, and what comes after it."""

    def __init__(self) -> None:
        self.data = bytearray()
        # What the side gets back, padding included, when the data is passed on.
        self.owed = 0
        self.trailers: Fields = []
        self.ended = False
        self.reset: int | None = None
        self.done = False


class _Connection(H2Connection):
    MAX_CLOSED_STREAMS = 1024  # remembered each by each: those before are known by their numbers alone


class _Stream:
    """A request and its answer: the numbers of the stream, and the ways from each side."""

    def __init__(self, box: int, peer: int) -> None:
        self.ids = (box, peer)
        self.ways = (_Way(), _Way())
        self.answered = False


class Relay:
    """See the module. What `take` has for either side at the beginning greets it. ``requests``: how many came."""

    def __init__(self, rewrite: Callable[[Fields], Fields]) -> None:
        """``rewrite`` returns the head of a request as it goes to the peer. Raises `ValueError` for one that must
        not go on; the text is the reason."""
        self._rewrite = rewrite
        self._sides = (_connection(Side.BOX), _connection(Side.PEER))
        self._cutters = (Cutter(_HEADER_BYTES, preface=True), Cutter(_HEADER_BYTES, preface=False))
        self._streams: tuple[dict[int, _Stream], dict[int, _Stream]] = ({}, {})
        self._output = (bytearray(), bytearray())
        self._farewell = b""
        self._settings = [0, 0]
        self._abandoned = 0
        self._leaving = False
        self.requests = 0

    @property
    def is_over(self) -> bool:
        """Whether the peer takes no more requests, and has answered those that it took."""
        return self._leaving and not self._streams[Side.BOX]

    def take(self, side: Side) -> bytes:
        """Return the bytes that are to be sent to a side now. It makes room for more: there is nothing left when none
        came, and the other side may have something then."""
        self._collect(side)
        data = bytes(self._output[side])
        self._output[side].clear()
        if side is Side.BOX:
            data, self._farewell = data + self._farewell, b""
        if data:
            self._pass_on()
        return data

    def receive(self, side: Side, data: bytes) -> None:
        """Take the next bytes of a side. Raises `BrokenError`."""
        try:
            for frame in self._cutters[side].feed(data):
                self._take_frame(side, frame)
                self._bound()
            self._pass_on()
        except (ProtocolError, FrameError, BrokenError) as error:
            for streams in self._streams:  # what went on is over
                streams.clear()
            if isinstance(error, BrokenError):
                raise
            raise BrokenError(side, f"malformed HTTP/2: {error}", malformed=True) from None

    def peer_ended(self) -> None:
        """The peer has ended its connection: what it said still reaches the box."""
        for stream in self._streams[Side.BOX].values():
            if not stream.ways[Side.PEER].ended:
                self._break_off(stream, ErrorCodes.INTERNAL_ERROR)
        self._leave(ErrorCodes.NO_ERROR)
        self._pass_on()

    # What comes.

    def _take_frame(self, side: Side, frame: Frame) -> None:
        if frame.kind == GOAWAY:
            # h2 would end the connection, although requests that the peer has taken go on.
            if side is Side.PEER:
                self._take_goaway(frame.payload)
            return
        if frame.kind == SETTINGS and not frame.flags & ACK:
            self._settings[side] += 1
            if self._settings[side] > _MOST_SETTINGS:
                raise BrokenError(side, "it keeps changing the settings of HTTP/2")
        for event in self._sides[side].receive_data(frame.data):
            match event:
                case RemoteSettingsChanged():
                    self._take_settings(side)
                case RequestReceived() if side is Side.PEER:
                    raise FrameError("a request, from who is to answer them")
                case RequestReceived():
                    self._take_request(event)
                case _:
                    self._take_event(side, event)

    def _take_goaway(self, payload: bytes) -> None:
        if len(payload) < 8:
            raise FrameError("a GOAWAY that is too short")
        last, code = struct.unpack_from(">II", payload)
        self._leave(code)
        for number, stream in list(self._streams[Side.PEER].items()):
            if number > last & 0x7FFFFFFF:  # the peer has not looked at it, so it can be asked again
                self._sides[Side.BOX].reset_stream(stream.ids[Side.BOX], ErrorCodes.REFUSED_STREAM)
                self._drop(stream)

    def _take_settings(self, side: Side) -> None:
        connection = self._sides[side]
        if connection.encoder.header_table_size > _TABLE_BYTES:  # ours would hold as much
            connection.encoder.header_table_size = _TABLE_BYTES
        box, most = self._sides[Side.BOX], min(_MOST_STREAMS, self._most_streams())
        if side is Side.PEER and most != box.local_settings.max_concurrent_streams:
            box.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: most})

    def _take_request(self, event: RequestReceived) -> None:
        self.requests += 1
        box, peer = self._sides
        try:
            fields = self._rewrite(_fields(event.headers))
            if sum(len(name) + len(value) + _FIELD_BYTES for name, value in fields) > _HEADER_BYTES:
                raise ValueError(f"with its values the head of the request is longer than {_HEADER_BYTES} bytes")
        except ValueError as error:
            self._deny(event.stream_id, str(error))
            raise BrokenError(Side.BOX, str(error)) from None
        if self._leaving or len(self._streams[Side.PEER]) >= self._most_streams():
            box.reset_stream(event.stream_id, ErrorCodes.REFUSED_STREAM)
            return
        stream = _Stream(event.stream_id, peer.get_next_available_stream_id())
        for side in Side:
            self._streams[side][stream.ids[side]] = stream
        self._send_head(stream, Side.BOX, fields, ended=event.stream_ended is not None)

    def _take_event(self, side: Side, event: Event) -> None:
        stream = self._streams[side].get(getattr(event, "stream_id", None) or 0)
        if isinstance(event, DataReceived) and (stream is None or stream.ways[side].done):  # nobody wants it any more
            self._sides[side].acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            return
        if stream is None:
            return
        way = stream.ways[side]
        match event:
            case InformationalResponseReceived():
                self._sides[Side.BOX].send_headers(stream.ids[Side.BOX], _fields(event.headers))
            case ResponseReceived():
                stream.answered = True
                self._abandoned = max(0, self._abandoned - 1)
                self._send_head(stream, Side.PEER, _fields(event.headers), ended=event.stream_ended is not None)
            case DataReceived():
                way.data += event.data
                way.owed += event.flow_controlled_length
            case TrailersReceived():
                way.trailers = _fields(event.headers)
            case StreamEnded():
                way.ended = True
            case StreamReset() if side is Side.PEER:
                self._break_off(stream, event.error_code)
            case StreamReset():
                self._abandon(stream, event.error_code)

    def _abandon(self, stream: _Stream, code: int) -> None:
        self._sides[Side.PEER].reset_stream(stream.ids[Side.PEER], code)
        self._drop(stream)
        self._abandoned += not stream.answered
        if self._abandoned > _MOST_ABANDONED:
            raise BrokenError(Side.BOX, "it breaks off one request after the other")

    def _break_off(self, stream: _Stream, code: int) -> None:
        """The peer wants no more of a request; what it has answered goes on."""
        stream.ways[Side.PEER].reset = code
        request = stream.ways[Side.BOX]
        request.data.clear()
        request.done = True
        self._give_back(stream, Side.BOX, request.owed)

    def _bound(self) -> None:
        for side in Side:
            self._collect(side)
            if len(self._output[side]) > _MOST_BYTES:
                raise BrokenError(side, "it does not take what it is sent")

    def _most_streams(self) -> int:
        return self._sides[Side.PEER].remote_settings.max_concurrent_streams

    # What goes.

    def _collect(self, side: Side) -> None:
        self._output[side].extend(self._sides[side].data_to_send())

    def _send_head(self, stream: _Stream, side: Side, fields: Fields, *, ended: bool) -> None:
        self._sides[side.other].send_headers(stream.ids[side.other], fields, end_stream=ended)
        stream.ways[side].done = ended

    def _pass_on(self) -> None:
        """Let all streams go on as far as there is room, by turns."""
        moving = True
        while moving:
            moving = False
            for stream in list(self._streams[Side.BOX].values()):
                for side in Side:
                    moving = self._pass_frame(stream, side) or moving
                self._settle(stream)

    def _pass_frame(self, stream: _Stream, side: Side) -> bool:
        """Returns whether something went."""
        way, target, number = stream.ways[side], self._sides[side.other], stream.ids[side.other]
        if way.done:
            return False
        if way.data:
            room = min(target.local_flow_control_window(number), target.max_outbound_frame_size, FRAME_BYTES)
            if room <= 0 or len(self._output[side.other]) >= _QUEUE_BYTES:
                return False
            piece = bytes(way.data[:room])
            del way.data[:room]
            way.done = way.ended and not way.data and not way.trailers
            target.send_data(number, piece, end_stream=way.done)
            self._collect(side.other)
            self._give_back(stream, side, len(piece) if way.data else way.owed)
            return True
        self._give_back(stream, side, way.owed)
        if way.trailers:
            target.send_headers(number, way.trailers, end_stream=True)
        elif way.ended:
            target.end_stream(number)
        way.done = way.ended or way.reset is not None
        return way.done

    def _give_back(self, stream: _Stream, side: Side, size: int) -> None:
        if size:
            stream.ways[side].owed -= size
            self._sides[side].acknowledge_received_data(size, stream.ids[side])

    def _settle(self, stream: _Stream) -> None:
        """Forget a stream that has come to its end."""
        request, answer = stream.ways
        if not (request.done and answer.done):
            return
        if answer.reset is not None and not (request.ended and answer.ended):
            self._sides[Side.BOX].reset_stream(stream.ids[Side.BOX], answer.reset)
        self._drop(stream)

    def _drop(self, stream: _Stream) -> None:
        for side in Side:
            self._give_back(stream, side, stream.ways[side].owed)
            del self._streams[side][stream.ids[side]]

    def _leave(self, code: int) -> None:
        """Tell the box to ask elsewhere from now on."""
        if not self._leaving:
            self._leaving = True
            frame = GoAwayFrame(0, last_stream_id=self._sides[Side.BOX].highest_inbound_stream_id, error_code=code)
            self._farewell = frame.serialize()

    def _deny(self, number: int, reason: str) -> None:
        box = self._sides[Side.BOX]
        body = f"hutch: {reason}\n".encode()[: max(0, box.local_flow_control_window(number))]
        box.send_headers(number, [(b":status", b"403"), (b"content-type", b"text/plain")])
        box.send_data(number, body, end_stream=True)
        box.close_connection()


def _connection(side: Side) -> H2Connection:
    connection = _Connection(H2Configuration(client_side=side is Side.PEER, header_encoding=None))
    values = {
        SettingCodes.INITIAL_WINDOW_SIZE: _STREAM_WINDOW,
        SettingCodes.MAX_CONCURRENT_STREAMS: _MOST_STREAMS,
        SettingCodes.MAX_HEADER_LIST_SIZE: _HEADER_BYTES,
        SettingCodes.ENABLE_PUSH: 0,
    }
    if side is Side.BOX:
        del values[SettingCodes.ENABLE_PUSH]  # it is the client's to say
    connection.local_settings = Settings(client=side is Side.PEER, initial_values=values)
    connection.decoder.max_header_list_size = _HEADER_BYTES
    connection.initiate_connection()
    connection.increment_flow_control_window(_CONNECTION_WINDOW - _FIRST_WINDOW)
    return connection


def _fields(headers: Iterable[Any]) -> Fields:
    """As tuples that keep what was said about them: whether a header may be indexed."""
    return list(headers)
