"""The agent of a box that has ended, as far as its main command goes: what the log and the exit record hold, told in
the agent protocol. So a watcher that comes late, or lost its connection at the very end, is served like any other."""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING

import anyio

from hutch.core import agentproto as proto
from hutch.core.frames import Decoder, Frame, FrameError, encode
from hutch.runtime import logs

if TYPE_CHECKING:
    import socket
    from pathlib import Path

_WINDOW = 512 * 1024
_LIFE_SECONDS = 300.0


async def haunt(sock: socket.socket, directory: Path, exec_id: str) -> None:
    """Answer one watcher until it hangs up (five minutes at most)."""
    loop = asyncio.get_running_loop()
    decoder = Decoder()
    with sock, anyio.move_on_after(_LIFE_SECONDS):
        try:
            while data := await loop.sock_recv(sock, _WINDOW):
                for frame in decoder.receive(data):
                    for answer in _answers(frame, directory, exec_id):
                        await loop.sock_sendall(sock, answer)
        except (OSError, FrameError):
            return


def _answers(frame: Frame, directory: Path, exec_id: str) -> list[bytes]:
    if frame.type == proto.Request.HELLO:
        return [encode(proto.Reply.HELLO_OK, struct.pack("<IIII", proto.VERSION, _WINDOW, 0, 0), req=frame.req)]
    if frame.type == proto.Request.ATTACH:
        return _attached(frame, directory, exec_id)
    if not frame.req:
        return []
    return [_failed(frame, exec_id, proto.FailCode.FINISHED, "the command has ended")]


def _attached(frame: Frame, directory: Path, exec_id: str) -> list[bytes]:
    ended = logs.exit_record(directory)
    if ended is None or len(frame.payload) != 17:
        return [_failed(frame, exec_id, proto.FailCode.NOT_FOUND, "how the command ended is not known")]
    mask, *positions = struct.unpack("<BQQ", frame.payload)
    status, timed_out, time = ended
    exited = struct.pack("<iBxxxQQQQ", status, timed_out, int(time * 1e9), 0, 0, 0)
    frames = [
        encode(proto.Reply.ATTACHED, struct.pack("<IBxxxQ", 0, 1, 0), req=frame.req, exec_id=exec_id),
        encode(proto.Reply.EXITED, exited, exec_id=exec_id),
    ]
    records = logs.read(directory)
    for stream in proto.STREAMS:
        if mask >> (stream - 1) & 1:
            frames += _output(records, stream, positions[stream - 1], exec_id)
    return frames


def _output(records: list[logs.Record], stream: int, position: int, exec_id: str) -> list[bytes]:
    frames = []
    for record in logs.beyond(records, {stream: position, 3 - stream: 2**64 - 1}):
        if record.position > position:
            gap = struct.pack("<QQ", position, record.position)
            frames.append(encode(proto.Reply.GAP, gap, stream=stream, exec_id=exec_id))
        data = struct.pack("<Q", record.position) + record.data
        frames.append(encode(proto.Reply.DATA, data, stream=stream, exec_id=exec_id))
        position = record.position + len(record.data)
    frames.append(encode(proto.Reply.EOF, struct.pack("<QB", position, 0), stream=stream, exec_id=exec_id))
    return frames


def _failed(frame: Frame, exec_id: str, code: proto.FailCode, message: str) -> bytes:
    payload = struct.pack("<HH", code, 0) + message.encode()
    return encode(proto.Reply.FAILED, payload, req=frame.req, exec_id=exec_id)
