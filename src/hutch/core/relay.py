"""What passes through a relay between a watcher and the agent of a box (docs/remote.md). Sans-IO.

A relay serves one watcher of one execution, and after its end of another one. It looks at the headers of frames and at
nothing else: `Upward` lets through what a watcher may ask of its own execution, `Downward` what the agent says about
it. Whole frames come out, in order, unchanged but for one flag, and for output that the relay reads from the agent's
shared memory: that goes on in frames as if it had come in them.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

from hutch.core.agentproto import EXIT_FLAGS, EXIT_OOM, FOREVER, Reply, Request
from hutch.core.frames import HEADER, MAX_PAYLOAD, FrameError, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SUBPROTOCOL = "hutch.agent.v1"
"""The WebSocket sub-protocol: binary messages that hold whole frames of the agent protocol, version 1."""

MAX_MESSAGE = 4 << 20
"""No message is larger: one read of the agent's socket, the frame that it completes, and a little more."""

OWN_REQUESTS = range(0xFFFFFF00, 0xFFFFFFFF)
"""Numbers of requests that a relay makes for itself; a watcher uses others."""

SILENCE = 30.0
"""Seconds without a byte after which the other side counts as gone."""

HEARTBEAT = 10.0
"""Seconds between two PINGs of a watcher."""

_UP = frozenset(
    {
        Request.ATTACH,
        Request.DETACH,
        Request.ACK,
        Request.STDIN,
        Request.STDIN_EOF,
        Request.SIGNAL,
        Request.RESIZE,
        Request.FORGET,
    }
)
_READING = frozenset({Request.ATTACH, Request.DETACH, Request.ACK})
# What somebody does, as against what a client does by itself.
_USE = frozenset({Request.STDIN, Request.STDIN_EOF, Request.SIGNAL, Request.RESIZE})
_REPLIES = frozenset({Reply.ATTACHED, Reply.OK, Reply.FAILED})
_EVENTS = frozenset(
    {
        Reply.DATA,
        Reply.GAP,
        Reply.RANGE,
        Reply.EOF,
        Reply.EXITED,
        Reply.STDIN_CREDIT,
        Reply.STDIN_CLOSED,
    }
)
_OWN_REPLIES = frozenset({Reply.SHM_OK, Reply.FAILED})
_FEATURES = slice(8, 12)
_RANGE = struct.Struct("<QI")
_POSITION = struct.Struct("<Q")
# Output in one frame, at most (docs/agent-protocol.md), and about as much in one message.
_DATA_SIZE = 256 * 1024
_FULL = 512 * 1024


# A frame in pieces.
_Parts = tuple[bytes | memoryview, ...]


class _Header(NamedTuple):
    type: int
    stream: int
    req: int
    exec_id: bytes
    start: int
    end: int


class _Cutter:
    """Cuts a byte stream into frames without copying their payloads; keeps at most one incomplete frame."""

    def __init__(self) -> None:
        self._rest = b""

    def cut(self, data: bytes) -> tuple[bytes, list[_Header]]:
        """Return a buffer and the whole frames in it. Raises `FrameError`."""
        buffer = b"".join((self._rest, data)) if self._rest else data
        headers = list(_headers(buffer))
        end = headers[-1].end if headers else 0
        self._rest = buffer[end:]
        return buffer, headers


class Upward:
    """From a watcher to the agent."""

    def __init__(
        self,
        exec_id: str,
        hello: bytes | None,
        used: Callable[[], object] = lambda: None,
        *,
        reading: bool = False,
    ) -> None:
        """``hello`` is the payload of the agent's HELLO_OK; without it HELLO and PING are answered by the next relay.
        ``used`` is called when the command gets something from the watcher. ``reading``: the watcher may look and do
        nothing else."""
        self._allowed = _READING if reading else _UP
        self._used = used
        self._id = exec_id.encode("ascii").ljust(12, b"\0")
        # Shared memory cannot travel.
        self._hello = None if hello is None else hello[: _FEATURES.start] + bytes(4) + hello[_FEATURES.stop :]
        self._cutter = _Cutter()

    def turn(self, exec_id: str) -> None:
        """From now on it is about another execution."""
        self._id = exec_id.encode("ascii").ljust(12, b"\0")

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Take bytes from the watcher; return what goes to the agent and what is answered from here.

        Raises `FrameError` for a frame that a watcher of this execution has no right to send.
        """
        buffer, headers = self._cutter.cut(data)
        onward, answers = bytearray(), bytearray()
        for header in headers:
            if header.type in (Request.HELLO, Request.PING):
                if self._hello is None:
                    onward += memoryview(buffer)[header.start : header.end]
                elif header.type == Request.HELLO:
                    answers += encode(Reply.HELLO_OK, self._hello, req=header.req)
                else:
                    answers += encode(Reply.PONG, buffer[header.start + HEADER.size : header.end], req=header.req)
            elif header.type in self._allowed and header.exec_id == self._id and header.req not in OWN_REQUESTS:
                if header.type in _USE:
                    self._used()
                onward += memoryview(buffer)[header.start : header.end]
            else:
                raise FrameError(f"a frame of type {header.type} is none that a watcher may send")
        return bytes(onward), bytes(answers)


class Shared(Protocol):
    """The agent's shared memory, as far as one execution's output is concerned."""

    def count(self, stream: int, length: int) -> None:
        """So much came in frames."""

    def answered(self, type: int, req: int, payload: bytes) -> None:
        """The agent has answered one of `OWN_REQUESTS`. Raises `FrameError`."""

    def pieces(self, stream: int, position: int, length: int) -> Iterable[tuple[int, memoryview]]:
        """The bytes of a stream from ``position`` on, each piece with the position after its last. Raises
        `FrameError`."""


class Downward:
    """From the agent to a watcher. ``oom_killed`` is asked at the end of the execution: the one thing about it that
    the agent of a container does not know, and that is added to its notice."""

    def __init__(
        self, exec_id: str, oom_killed: Callable[[], bool] = lambda: False, shared: Shared | None = None
    ) -> None:
        self._oom_killed = oom_killed
        self._shared = shared
        self._id = exec_id.encode("ascii").ljust(12, b"\0")
        # The execution before, of which the agent may still have something to say.
        self._before: bytes | None = None
        self._cutter = _Cutter()

    def turn(self, exec_id: str, oom_killed: Callable[[], bool] = lambda: False) -> None:
        """From now on it is about another execution, also for the shared memory."""
        self._oom_killed = oom_killed
        self._before, self._id = self._id, exec_id.encode("ascii").ljust(12, b"\0")

    def feed(self, data: bytes) -> Iterator[bytes | memoryview]:
        """Take bytes from the agent; return messages of whole frames for the watcher. Raises `FrameError` for what is
        not about this execution.

        A message is to be sent before the next one is asked for: few bytes about shared memory can stand for many.
        """
        buffer, headers = self._cutter.cut(data)
        view = memoryview(buffer)
        parts: list[bytes | memoryview] = []
        size = passed = 0
        for header in headers:
            instead = self._instead(view, header)
            if instead is None:
                continue
            parts.append(view[passed : header.start])
            passed = header.end
            for frame in instead:
                parts += frame
                size += sum(map(len, frame))
                if size >= _FULL:
                    yield b"".join(parts)
                    parts.clear()
                    size = 0
        if headers:
            parts.append(view[passed : headers[-1].end])
        message = parts[0] if len(parts) == 1 else b"".join(parts)
        if message:
            yield message

    def _instead(self, view: memoryview, header: _Header) -> Iterable[_Parts] | None:
        """The frames that the watcher gets instead of this one; ``None`` if it gets the frame itself."""
        if header.type in _EVENTS and header.exec_id == self._id:
            if header.type == Reply.DATA and self._shared is not None:
                self._shared.count(header.stream, header.end - header.start)
            elif header.type == Reply.RANGE:
                return self._output(view, header)
            elif header.type == Reply.EXITED and self._oom_killed():
                return [_flagged(view[header.start : header.end])]
            return None
        if header.req in OWN_REQUESTS and header.type in _OWN_REPLIES and self._shared is not None:
            self._shared.answered(header.type, header.req, bytes(view[header.start + HEADER.size : header.end]))
            return ()
        if header.type in _REPLIES and header.req:
            return None
        if header.type in _EVENTS and header.exec_id == self._before:
            return ()
        raise FrameError(f"the agent sent a frame of type {header.type} that this watcher did not ask for")

    def _output(self, view: memoryview, header: _Header) -> Iterator[_Parts]:
        if self._shared is None or header.end - header.start != HEADER.size + _RANGE.size:
            raise FrameError("the agent announced shared output that was not asked for")
        position, length = _RANGE.unpack_from(view, header.start + HEADER.size)
        if position + length > FOREVER:
            raise FrameError("the agent announced output at a position that cannot be")
        for end, piece in self._shared.pieces(header.stream, position, length):
            for offset in range(0, len(piece), _DATA_SIZE):
                data = piece[offset : offset + _DATA_SIZE]
                head = HEADER.pack(_POSITION.size + len(data), Reply.DATA, header.stream, 0, 0, header.exec_id)
                yield head, _POSITION.pack(end - len(piece) + offset), data


def _flagged(exited: memoryview) -> _Parts:
    place = HEADER.size + EXIT_FLAGS
    if place >= len(exited):
        raise FrameError("a notice of the end that is too short")
    return exited[:place], bytes((exited[place] | EXIT_OOM,)), exited[place + 1 :]


def _headers(buffer: bytes) -> Iterator[_Header]:
    position = 0
    while len(buffer) - position >= HEADER.size:
        length, kind, stream, zero, req, exec_id = HEADER.unpack_from(buffer, position)
        if length > MAX_PAYLOAD or zero or stream > 2:
            raise FrameError("a malformed frame header")
        end = position + HEADER.size + length
        if end > len(buffer):
            return
        yield _Header(kind, stream, req, exec_id, position, end)
        position = end
