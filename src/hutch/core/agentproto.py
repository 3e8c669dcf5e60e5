"""The host's side of the agent protocol (docs/agent-protocol.md): requests to bytes, frames to events. Sans-IO.

Nothing that the agent sends is trusted: sizes, positions and ids are checked, and what does not fit raises
`FrameError`.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING

import msgspec

from hutch.core.frames import Frame, FrameError, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

VERSION = 1
STDOUT = 1
STDERR = 2
STREAMS = (STDOUT, STDERR)
FOREVER = 2**64 - 1


class Request(enum.IntEnum):
    """Frame types from the host."""

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
    HOLD = 19


class Reply(enum.IntEnum):
    """Frame types from the agent."""

    HELLO_OK = 64
    STARTED = 65
    ATTACHED = 66
    EXECS = 67
    STATS = 68
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


class FailCode(enum.IntEnum):
    """Why the agent refused."""

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


class FileOp(enum.IntEnum):
    """Operations that the agent serves itself, on files and on a port of the box (``TUNNEL``)."""

    GET = 1
    PUT = 2
    STAT = 3
    LIST = 4
    ROOT = 5
    """As GET, with extended attributes, of one file system alone."""
    TUNNEL = 6


class Hello(msgspec.Struct, frozen=True):
    """HELLO_OK."""

    version: int
    window: int
    shared_memory: bool
    uptime: float


class Started(msgspec.Struct, frozen=True):
    """STARTED."""

    pid: int


class Attached(msgspec.Struct, frozen=True):
    """ATTACHED."""

    stdin_credit: int
    exited: bool
    stdin_accepted: int


class Failed(msgspec.Struct, frozen=True):
    """FAILED."""

    code: int
    errno: int
    message: str


class Ok(msgspec.Struct, frozen=True):
    """OK, PONG."""


class ShmOk(msgspec.Struct, frozen=True):
    """SHM_OK; the descriptor travels beside it."""

    window: int


class ExecRecord(msgspec.Struct, frozen=True):
    """One entry of EXECS."""

    id: str
    exited: bool
    tty: bool
    main: bool
    timed_out: bool
    pid: int
    status: int
    started_at: float
    ended_at: float


class Execs(msgspec.Struct, frozen=True):
    """EXECS."""

    records: tuple[ExecRecord, ...]


class AgentStats(msgspec.Struct, frozen=True):
    """STATS."""

    processes: int
    started: int
    failed: int
    output_bytes: int
    input_bytes: int
    uptime: float
    oom_kills: int
    """Of a VM's kernel; 0 in a container."""


class Data(msgspec.Struct, frozen=True):
    """Output bytes from ``position`` on."""

    stream: int
    position: int
    data: bytes | memoryview


class Range(msgspec.Struct, frozen=True):
    """Output bytes that stand in the shared window."""

    stream: int
    position: int
    length: int


class Gap(msgspec.Struct, frozen=True):
    """The bytes ``start`` … ``end`` were dropped unread."""

    stream: int
    start: int
    end: int


class Eof(msgspec.Struct, frozen=True):
    """The end of a stream."""

    stream: int
    position: int
    lingering: bool


class Exited(msgspec.Struct, frozen=True):
    """The process was reaped. ``oom_killed``: the agent of a VM knows; of a container it is added by the relay beside
    the box, which sees its control group."""

    status: int
    timed_out: bool
    time: float
    user: float
    system: float
    max_rss: int
    oom_killed: bool = False


class StdinCredit(msgspec.Struct, frozen=True):
    """So many bytes more may be sent."""

    size: int


class StdinClosed(msgspec.Struct, frozen=True):
    """The command no longer reads."""


Event = Data | Range | Gap | Eof | Exited | StdinCredit | StdinClosed
Answer = Hello | Started | Attached | Failed | Ok | ShmOk | Execs | AgentStats

_RECORD = struct.Struct("<12sBBHIiQQ")
_EXITED = struct.Struct("<iBxxxQQQQ")
EXIT_FLAGS, EXIT_OOM = 4, 4
"""Where the flags are in the payload of EXITED, and the one for a process that memory ran out for."""
_U64 = struct.Struct("<Q")
_DATA_HEAD = _U64.size


def start(
    exec_id: str,
    argv: Sequence[str],
    *,
    req: int,
    env: Mapping[str, str],
    cwd: str = "",
    user: str = "",
    tty: tuple[int, int] | None = None,
    stdin: bool = False,
    main: bool = False,
    watch: bool = False,
    timeout: float | None = None,
    kill_after: float = 2.0,
    linger: float | None = 0.3,
    file_op: FileOp | None = None,
    path: str = "",
) -> bytes:
    """Encode START. Strings may hold surrogate-escaped bytes, as paths of the operating system do."""
    parts = [_attribute(1, _bytes(argument)) for argument in argv]
    parts += [_attribute(2, _bytes(f"{name}={value}")) for name, value in env.items()]
    if cwd:
        parts.append(_attribute(3, _bytes(cwd)))
    if user:
        parts.append(_attribute(4, _bytes(user)))
    if tty is not None:
        parts.append(_attribute(5, struct.pack("<HH", *tty)))
    parts.append(_attribute(6, struct.pack("<I", stdin | main << 1 | watch << 2)))
    if timeout:
        parts.append(_attribute(7, _U64.pack(max(1, round(timeout * 1000)))))
    parts.append(_attribute(8, _U64.pack(round(kill_after * 1000))))
    parts.append(_attribute(9, _U64.pack(FOREVER if linger is None else round(linger * 1000))))
    if file_op is not None:
        parts.append(_attribute(11, bytes([file_op]) + _bytes(path)))
    return encode(Request.START, b"".join(parts), req=req, exec_id=exec_id)


def hello(req: int) -> bytes:
    """Encode HELLO."""
    return encode(Request.HELLO, struct.pack("<I", VERSION), req=req)


def attach(exec_id: str, positions: Mapping[int, int], *, req: int) -> bytes:
    """Encode ATTACH to the streams that are keys of ``positions``, each from its position on."""
    mask = sum(1 << (stream - 1) for stream in positions)
    payload = struct.pack("<BQQ", mask, positions.get(STDOUT, 0), positions.get(STDERR, 0))
    return encode(Request.ATTACH, payload, req=req, exec_id=exec_id)


def detach(exec_id: str, streams: Sequence[int], *, req: int = 0) -> bytes:
    """Encode DETACH."""
    return encode(Request.DETACH, bytes([sum(1 << (s - 1) for s in streams)]), req=req, exec_id=exec_id)


def ack(exec_id: str, stream: int, position: int) -> bytes:
    """Encode ACK: everything before ``position`` was consumed."""
    return encode(Request.ACK, _U64.pack(position), stream=stream, exec_id=exec_id)


def stdin(exec_id: str, data: bytes) -> bytes:
    """Encode STDIN."""
    return encode(Request.STDIN, data, exec_id=exec_id)


def stdin_eof(exec_id: str) -> bytes:
    """Encode STDIN_EOF."""
    return encode(Request.STDIN_EOF, exec_id=exec_id)


def signal(exec_id: str, signum: int, *, req: int) -> bytes:
    """Encode SIGNAL."""
    return encode(Request.SIGNAL, struct.pack("<I", signum), req=req, exec_id=exec_id)


def resize(exec_id: str, rows: int, cols: int, *, req: int) -> bytes:
    """Encode RESIZE."""
    return encode(Request.RESIZE, struct.pack("<HH", rows, cols), req=req, exec_id=exec_id)


def clock(unix_ns: int, *, req: int) -> bytes:
    """Encode CLOCK: set a VM's time of day."""
    return encode(Request.CLOCK, struct.pack("<Q", unix_ns), req=req)


def network(settings: bytes, *, req: int) -> bytes:
    """Encode NETWORK: bring up a VM's network card. ``settings``: as docs/agent-protocol.md says."""
    return encode(Request.NETWORK, settings, req=req)


def poweroff(grace: float, signum: int, *, req: int) -> bytes:
    """Encode POWEROFF."""
    return encode(Request.POWEROFF, struct.pack("<II", round(grace * 1000), signum), req=req)


def simple(kind: Request, *, req: int, exec_id: str = "", stream: int = 0) -> bytes:
    """Encode a request without payload (LIST, FORGET, STATS, SHM, PING, SYNC, HOLD)."""
    return encode(kind, req=req, exec_id=exec_id, stream=stream)


def decode_answer(frame: Frame) -> Answer | None:
    """Turn a reply frame into its value; ``None`` for a frame that is not a reply. Raises `FrameError`."""
    decoder = _ANSWERS.get(frame.type)
    if decoder is None:
        return None
    try:
        return decoder(frame)
    except (struct.error, ValueError, IndexError) as error:
        raise FrameError(f"the agent sent a malformed reply of type {frame.type}") from error


def decode_event(frame: Frame) -> Event:
    """Turn an event frame into its value. Raises `FrameError`."""
    decoder = _EVENTS.get(frame.type)
    if decoder is None:
        raise FrameError(f"the agent sent a frame of unknown type {frame.type}")
    if not frame.exec_id or (frame.type <= Reply.EOF and frame.stream not in STREAMS):
        raise FrameError(f"the agent sent an event of type {frame.type} without its execution or stream")
    try:
        return decoder(frame)
    except (struct.error, ValueError) as error:
        raise FrameError(f"the agent sent a malformed event of type {frame.type}") from error


def _attribute(tag: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, 0, len(value)) + value


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _hello(frame: Frame) -> Hello:
    version, window, features, uptime = struct.unpack("<IIII", frame.payload)
    if not 4096 <= window <= 1 << 26:
        raise ValueError("window")
    return Hello(version, window, bool(features & 1), uptime / 1000)


def _execs(frame: Frame) -> Execs:
    records = []
    for raw, state, flags, _, pid, status, began, ended in _RECORD.iter_unpack(frame.payload):
        name = raw.rstrip(b"\0").decode("ascii")
        records.append(
            ExecRecord(
                name,
                state == 1,
                bool(flags & 1),
                bool(flags & 4),
                bool(flags & 8),
                pid,
                status,
                began / 1e9,
                ended / 1e9,
            )
        )
    return Execs(tuple(records))


def _stats(frame: Frame) -> AgentStats:
    processes, started, failed, out, into, uptime, kills = struct.unpack("<QQQQQQQ", frame.payload)
    return AgentStats(processes, started, failed, out, into, uptime / 1000, kills)


def _attached(frame: Frame) -> Attached:
    credit, state, accepted = struct.unpack("<IBxxxQ", frame.payload)
    return Attached(credit, state == 1, accepted)


def _failed(frame: Frame) -> Failed:
    code, errno = struct.unpack_from("<HH", frame.payload)
    return Failed(code, errno, frame.payload[4:].decode("utf-8", "replace"))


def _data(frame: Frame) -> Data:
    (position,) = _U64.unpack_from(frame.payload)
    return Data(frame.stream, position, memoryview(frame.payload)[_DATA_HEAD:])


def _range(frame: Frame) -> Range:
    return Range(frame.stream, *struct.unpack("<QI", frame.payload))


def _gap(frame: Frame) -> Gap:
    start_, end = struct.unpack("<QQ", frame.payload)
    if end < start_:
        raise ValueError("gap")
    return Gap(frame.stream, start_, end)


def _eof(frame: Frame) -> Eof:
    position, flags = struct.unpack("<QB", frame.payload)
    return Eof(frame.stream, position, bool(flags & 1))


def _exited(frame: Frame) -> Exited:
    status, flags, time, user, system, rss = _EXITED.unpack(frame.payload)
    return Exited(status, bool(flags & 1), time / 1e9, user / 1e6, system / 1e6, rss, bool(flags & EXIT_OOM))


_ANSWERS: dict[int, Callable[[Frame], Answer]] = {
    Reply.HELLO_OK: _hello,
    Reply.STARTED: lambda frame: Started(*struct.unpack("<I", frame.payload)),
    Reply.ATTACHED: _attached,
    Reply.EXECS: _execs,
    Reply.STATS: _stats,
    Reply.SHM_OK: lambda frame: ShmOk(*struct.unpack("<I", frame.payload)),
    Reply.PONG: lambda frame: Ok(),
    Reply.OK: lambda frame: Ok(),
    Reply.FAILED: _failed,
}

_EVENTS: dict[int, Callable[[Frame], Event]] = {
    Reply.DATA: _data,
    Reply.RANGE: _range,
    Reply.GAP: _gap,
    Reply.EOF: _eof,
    Reply.EXITED: _exited,
    Reply.STDIN_CREDIT: lambda frame: StdinCredit(*struct.unpack("<I", frame.payload)),
    Reply.STDIN_CLOSED: lambda frame: StdinClosed(),
}
