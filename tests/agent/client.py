"""A small blocking client of the agent protocol, and the agent as an ordinary process (docs/agent-protocol.md)."""

from __future__ import annotations

import array
import contextlib
import enum
import os
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

HEADER = struct.Struct("<IBBHI12s")
WINDOW = 512 * 1024
FOREVER = 2**64 - 1


class Kind(enum.IntEnum):
    """Frame types."""

    HELLO = 1
    START = 2
    ATTACH = 3
    DETACH = 4
    ACK = 5
    STDIN = 6
    STDIN_EOF = 7
    SIGNAL = 8
    RESIZE = 9
    LIST = 10
    FORGET = 11
    STATS = 12
    POWEROFF = 13
    SHM = 14
    PING = 15
    SYNC = 16
    CLOCK = 17
    NETWORK = 18
    HELLO_OK = 64
    STARTED = 65
    ATTACHED = 66
    EXECS = 67
    STATS_OK = 68
    SHM_OK = 69
    PONG = 70
    OK = 71
    FAILED = 72
    DATA = 80
    GAP = 81
    RANGE = 82
    EOF = 83
    EXITED = 84
    STDIN_CREDIT = 85
    STDIN_CLOSED = 86


class Fault(enum.IntEnum):
    """Codes of FAILED."""

    INVALID = 1
    NOT_FOUND = 2
    EXISTS = 3
    FINISHED = 4
    BUSY = 5
    REAPED = 6
    UNSUPPORTED = 7
    RESOURCE = 8
    COMMAND_NOT_FOUND = 16
    NOT_EXECUTABLE = 17
    BAD_CWD = 18
    BAD_USER = 19
    START_FAILED = 20


WITH_STDIN, MAIN, WATCH = 1, 2, 4


@dataclass(frozen=True)
class Frame:
    """One frame from the agent."""

    type: int
    stream: int
    req: int
    id: str
    payload: bytes

    def u32(self, offset: int = 0) -> int:
        return int(struct.unpack_from("<I", self.payload, offset)[0])

    def i32(self, offset: int = 0) -> int:
        return int(struct.unpack_from("<i", self.payload, offset)[0])

    def u64(self, offset: int = 0) -> int:
        return int(struct.unpack_from("<Q", self.payload, offset)[0])

    @property
    def failure(self) -> tuple[int, str]:
        """Code and message of FAILED."""
        assert self.type == Kind.FAILED, self
        return struct.unpack_from("<H", self.payload)[0], self.payload[4:].decode()


@dataclass
class Watched:
    """What one watcher saw of one execution. ``events`` is the order: data, gap, eof, exited."""

    data: dict[int, bytearray] = field(default_factory=lambda: {1: bytearray(), 2: bytearray()})
    position: dict[int, int] = field(default_factory=lambda: {1: 0, 2: 0})
    gaps: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: {1: [], 2: []})
    eof: dict[int, tuple[int, int]] = field(default_factory=dict)
    exited: Frame | None = None
    credit: int = 0
    stdin_closed: bool = False
    events: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        assert self.exited is not None
        return self.exited.i32()

    @property
    def timed_out(self) -> bool:
        assert self.exited is not None
        return bool(self.exited.payload[4] & 1)

    @property
    def stdout(self) -> bytes:
        return bytes(self.data[1])

    @property
    def stderr(self) -> bytes:
        return bytes(self.data[2])

    @property
    def complete(self) -> bool:
        return self.exited is not None and len(self.eof) == 2


def start_payload(
    argv: Sequence[str | bytes] = (),
    *,
    env: Sequence[str] = ("PATH=/usr/bin:/bin",),
    cwd: str | None = None,
    user: str | None = None,
    tty: tuple[int, int] | None = None,
    flags: int = WATCH,
    timeout_ms: int | None = None,
    kill_after_ms: int | None = None,
    linger_ms: int | None = None,
    limits: Sequence[tuple[int, int, int]] = (),
    file_op: bytes | None = None,
) -> bytes:
    """The attributes of START."""
    items: list[tuple[int, bytes]] = [(1, os.fsencode(a)) for a in argv]
    items += [(2, e.encode()) for e in env]
    for tag, text in ((3, cwd), (4, user)):
        if text is not None:
            items.append((tag, text.encode()))
    if tty is not None:
        items.append((5, struct.pack("<HH", *tty)))
    items.append((6, struct.pack("<I", flags)))
    for tag, number in ((7, timeout_ms), (8, kill_after_ms), (9, linger_ms)):
        if number is not None:
            items.append((tag, struct.pack("<Q", number)))
    items += [(10, struct.pack("<IIQQ", resource, 0, soft, hard)) for resource, soft, hard in limits]
    if file_op is not None:
        items.append((11, file_op))
    return b"".join(struct.pack("<HHI", tag, 0, len(value)) + value for tag, value in items)


def shell(script: str, **options: Any) -> bytes:
    """`start_payload` of a shell script."""
    return start_payload(["sh", "-c", script], **options)


class Client:
    """One connection. Every wait is bounded by ``patience`` seconds."""

    def __init__(self, path: Path, patience: float = 10.0) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(patience)
        self.socket.connect(str(path))
        self.patience = patience
        self.buffer = bytearray()
        self.fds: list[int] = []
        self.req = 0
        self.pending: list[Frame] = []
        self.windows: dict[tuple[str, int], memoryview] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def send_raw(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send(self, kind: int, payload: bytes = b"", *, stream: int = 0, req: int = 0, id: str = "") -> None:
        self.send_raw(HEADER.pack(len(payload), kind, stream, 0, req, id.encode()) + payload)

    def _receive(self) -> None:
        data, ancillary, _, _ = self.socket.recvmsg(256 * 1024, socket.CMSG_SPACE(4 * 8))
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self.fds.extend(fds)
        if not data:
            raise EOFError("the agent closed the connection")
        self.buffer += data

    def frame(self) -> Frame:
        """The next frame from the wire."""
        while True:
            if len(self.buffer) >= HEADER.size:
                length, kind, stream, zero, req, id = HEADER.unpack_from(self.buffer)
                assert length <= 1 << 20 and zero == 0
                if len(self.buffer) >= HEADER.size + length:
                    payload = bytes(self.buffer[HEADER.size : HEADER.size + length])
                    del self.buffer[: HEADER.size + length]
                    return Frame(kind, stream, req, id.rstrip(b"\0").decode(), payload)
            self._receive()

    def next(self) -> Frame:
        """The next frame that no request took."""
        return self.pending.pop(0) if self.pending else self.frame()

    def idle(self, seconds: float) -> bool:
        """Whether nothing arrives for so long."""
        if self.pending or self.buffer:
            return False
        self.socket.settimeout(seconds)
        try:
            self._receive()
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(self.patience)
        return False

    def request(self, kind: int, payload: bytes = b"", *, stream: int = 0, id: str = "") -> Frame:
        """Send and wait for the one reply; other frames are kept for `next`."""
        self.req += 1
        self.send(kind, payload, stream=stream, req=self.req, id=id)
        return self.reply(self.req)

    def reply(self, req: int) -> Frame:
        for index, frame in enumerate(self.pending):
            if frame.req == req:
                return self.pending.pop(index)
        while True:
            frame = self.frame()
            if frame.req == req:
                return frame
            self.pending.append(frame)

    def start(self, id: str, payload: bytes) -> Frame:
        return self.request(Kind.START, payload, id=id)

    def attach(self, id: str, streams: int = 3, out: int = 0, err: int = 0) -> Frame:
        return self.request(Kind.ATTACH, struct.pack("<BQQ", streams, out, err), id=id)

    def detach(self, id: str, streams: int = 3) -> Frame:
        return self.request(Kind.DETACH, bytes([streams]), id=id)

    def ack(self, id: str, stream: int, position: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # the agent may end with its last word
            self.send(Kind.ACK, struct.pack("<Q", position), stream=stream, id=id)

    def signal(self, id: str, number: int) -> Frame:
        return self.request(Kind.SIGNAL, struct.pack("<I", number), id=id)

    def resize(self, id: str, rows: int, cols: int) -> Frame:
        return self.request(Kind.RESIZE, struct.pack("<HH", rows, cols), id=id)

    def take(self, seen: Watched, frame: Frame, *, ack: bool = True) -> None:
        """Check one frame of an execution against what was seen before, and note it."""
        stream = frame.stream
        match frame.type:
            case Kind.DATA | Kind.RANGE:
                assert stream not in seen.eof, "data after the end"
                position = frame.u64()
                assert position == seen.position[stream], (position, seen.position)
                data = frame.payload[8:]
                if frame.type == Kind.RANGE:
                    window = self.windows[frame.id, stream]
                    at, size = position % WINDOW, frame.u32(8)
                    data = (bytes(window[at:]) + bytes(window[:at]))[:size]
                assert 0 < len(data) <= (WINDOW if frame.type == Kind.RANGE else 256 * 1024)
                seen.data[stream] += data
                seen.position[stream] += len(data)
                seen.events.append("data")
                if ack:
                    self.ack(frame.id, stream, seen.position[stream])
            case Kind.GAP:
                first, last = struct.unpack("<QQ", frame.payload)
                assert first == seen.position[stream] < last
                seen.gaps[stream].append((first, last))
                seen.position[stream] = last
                seen.events.append("gap")
            case Kind.EOF:
                assert stream not in seen.eof
                seen.eof[stream] = (frame.u64(), frame.payload[8])
                assert frame.u64() == seen.position[stream]
                seen.events.append("eof")
            case Kind.EXITED:
                assert seen.exited is None, "EXITED twice"
                seen.exited = frame
                seen.events.append("exited")
            case Kind.STDIN_CREDIT:
                seen.credit += frame.u32()
            case Kind.STDIN_CLOSED:
                seen.stdin_closed = True
            case _:
                raise AssertionError(frame)

    def watch(
        self, id: str, seen: Watched | None = None, *, until: Callable[[Watched], bool] | None = None, ack: bool = True
    ) -> Watched:
        """Collect until everything was seen (or ``until`` says so). Frames of other executions are kept."""
        seen = seen or Watched()
        later: list[Frame] = []
        done = until or (lambda s: s.complete)
        while not done(seen):
            frame = self.next()
            if frame.id == id and frame.req == 0:
                self.take(seen, frame, ack=ack)
            else:
                later.append(frame)
        self.pending = later + self.pending
        return seen

    def run(self, id: str, payload: bytes) -> Watched:
        started = self.start(id, payload)
        assert started.type == Kind.STARTED, started
        return self.watch(id)

    def poweroff(self, grace_ms: int = 0, number: int = 0) -> Frame:
        return self.request(Kind.POWEROFF, struct.pack("<II", grace_ms, number))
