"""What passes through a relay between a watcher and the agent of a box (docs/remote.md). Sans-IO.

A relay serves one watcher of one execution, and after its end of another one. It looks at the headers of frames and at
nothing else: `Upward` lets through what a watcher may ask of its own execution, `Downward` what the agent says about
it. Whole frames come out, in order, unchanged but for one flag.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hutch.core.agentproto import EXIT_FLAGS, EXIT_OOM, Reply, Request
from hutch.core.frames import HEADER, MAX_PAYLOAD, FrameError, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUBPROTOCOL = "hutch.agent.v1"
"""The WebSocket sub-protocol: binary messages that hold whole frames of the agent protocol, version 1."""

MAX_MESSAGE = 4 << 20
"""No message is larger: one read of the agent's socket, and the frame that it completes."""

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
_EVENTS = frozenset({Reply.DATA, Reply.GAP, Reply.EOF, Reply.EXITED, Reply.STDIN_CREDIT, Reply.STDIN_CLOSED})
_FEATURES = slice(8, 12)


class _Header(NamedTuple):
    type: int
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
            elif header.type in self._allowed and header.exec_id == self._id:
                if header.type in _USE:
                    self._used()
                onward += memoryview(buffer)[header.start : header.end]
            else:
                raise FrameError(f"a frame of type {header.type} is none that a watcher may send")
        return bytes(onward), bytes(answers)


class Downward:
    """From the agent to a watcher. ``oom_killed`` is asked at the end of the execution: the one thing about it that
    the agent does not know, and that is added to its notice."""

    def __init__(self, exec_id: str, oom_killed: Callable[[], bool] = lambda: False) -> None:
        self._oom_killed = oom_killed
        self._id = exec_id.encode("ascii").ljust(12, b"\0")
        # The execution before, of which the agent may still have something to say.
        self._before: bytes | None = None
        self._cutter = _Cutter()

    def turn(self, exec_id: str, oom_killed: Callable[[], bool] = lambda: False) -> None:
        """From now on it is about another execution."""
        self._oom_killed = oom_killed
        self._before, self._id = self._id, exec_id.encode("ascii").ljust(12, b"\0")

    def feed(self, data: bytes) -> bytes | memoryview:
        """Take bytes from the agent; return the whole frames for the watcher. Raises `FrameError` for what is not
        about this execution."""
        buffer, headers = self._cutter.cut(data)
        late = []
        for header in headers:
            if header.type in _EVENTS and header.exec_id == self._id:
                if header.type == Reply.EXITED and self._oom_killed():
                    buffer = _flagged(buffer, header)
                continue
            if header.type in _REPLIES and header.req:
                continue
            if header.type in _EVENTS and header.exec_id == self._before:
                late.append(header)
                continue
            raise FrameError(f"the agent sent a frame of type {header.type} that this watcher did not ask for")
        if late:
            return b"".join(buffer[header.start : header.end] for header in headers if header not in late)
        return memoryview(buffer)[: headers[-1].end] if headers else b""


def _flagged(buffer: bytes, exited: _Header) -> bytes:
    place = exited.start + HEADER.size + EXIT_FLAGS
    if place >= exited.end:
        raise FrameError("a notice of the end that is too short")
    return buffer[:place] + bytes((buffer[place] | EXIT_OOM,)) + buffer[place + 1 :]


def _headers(buffer: bytes) -> Iterator[_Header]:
    position = 0
    while len(buffer) - position >= HEADER.size:
        length, kind, stream, zero, req, exec_id = HEADER.unpack_from(buffer, position)
        if length > MAX_PAYLOAD or zero or stream > 2:
            raise FrameError("a malformed frame header")
        end = position + HEADER.size + length
        if end > len(buffer):
            return
        yield _Header(kind, req, exec_id, position, end)
        position = end
