"""The frame codec of the agent protocol (docs/agent-protocol.md), sans-IO."""

from __future__ import annotations

import struct
from typing import NamedTuple

from hutch.errors import UpstreamUnavailableError

HEADER = struct.Struct("<IBBHI12s")
MAX_PAYLOAD = 1 << 20
NO_ID = b"\0" * 12


class Frame(NamedTuple):
    """One frame. ``exec_id`` is empty where the frame concerns no execution."""

    type: int
    stream: int
    req: int
    exec_id: str
    payload: bytes


class FrameError(UpstreamUnavailableError):
    """The peer sent something that is not a frame."""


def encode(type: int, payload: bytes = b"", *, stream: int = 0, req: int = 0, exec_id: str = "") -> bytes:
    """Encode one frame."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"payload of {len(payload)} bytes is larger than {MAX_PAYLOAD}")
    return HEADER.pack(len(payload), type, stream, 0, req, exec_id.encode("ascii")) + payload


class Decoder:
    """Cuts a byte stream into frames.

    Feed it with `receive`; it keeps at most one incomplete frame (just over 1 MiB).
    """

    def __init__(self) -> None:
        # The start of a frame that has not come in whole.
        self._rest = bytearray()

    def receive(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Return the frames that these bytes complete. Raises `FrameError` for what cannot be one."""
        if self._rest:
            self._rest += data
            buffer: bytes | bytearray | memoryview = self._rest
        else:
            buffer = data
        frames: list[Frame] = []
        view = memoryview(buffer)
        position = 0
        try:
            while len(view) - position >= HEADER.size:
                length, kind, stream, zero, req, raw = HEADER.unpack_from(view, position)
                if length > MAX_PAYLOAD:
                    raise FrameError(f"the agent sent a frame of {length} bytes; at most {MAX_PAYLOAD} are legal")
                if zero or stream > 2:
                    raise FrameError("the agent sent a malformed frame header")
                end = position + HEADER.size + length
                if end > len(view):
                    break
                frames.append(Frame(kind, stream, req, _decode_id(raw), bytes(view[position + HEADER.size : end])))
                position = end
            rest = bytes(view[position:])
        finally:
            view.release()
        self._rest = bytearray(rest)
        return frames


def _decode_id(raw: bytes) -> str:
    text = raw.rstrip(b"\0")
    if not text:
        return ""
    if not text.isalnum() or not text.isascii():
        raise FrameError("the agent sent a frame with a malformed execution id")
    return text.decode("ascii")
