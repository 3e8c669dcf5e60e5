"""One execution as one watcher sees it: the order of its output, its drain and its end. Sans-IO.

    inputs                                       outputs
    receive(Data | Range | Gap | Eof | Exited)   Chunk, Lost   in order, for the stream's sink
    delivered(stream, position)                  Ack           what to tell the agent
    abandon(status)                              Finished      exactly once, and last

An execution is *reaped* when its exit is known, and *finished* when, besides, every stream has ended and all its
bytes were handed to their sinks. `Finished` is never put out before that: whoever learns that a command ended
already has everything that it wrote.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from hutch.core.agentproto import STREAMS, Data, Eof, Exited, Gap, Range
from hutch.core.frames import FrameError

if TYPE_CHECKING:
    from collections.abc import Iterable


class Phase(enum.IntEnum):
    """How far an execution is."""

    RUNNING = 0
    REAPED = 1
    FINISHED = 2


class Chunk(NamedTuple):
    """Output for a sink. ``data`` is ``None`` when the bytes stand in the shared window."""

    stream: int
    position: int
    length: int
    data: bytes | memoryview | None


class Lost(NamedTuple):
    """``size`` bytes before the next chunk were dropped unread."""

    stream: int
    size: int


class Ended(NamedTuple):
    """No more chunks will come for this stream."""

    stream: int


class Ack(NamedTuple):
    """Tell the agent that everything before ``position`` was consumed."""

    stream: int
    position: int


class Finished(NamedTuple):
    """The terminal event."""

    exit: Exited


Output = Chunk | Lost | Ended | Ack | Finished
StreamEvent = Data | Range | Gap | Eof | Exited


class _Flow(msgspec.Struct):
    """The state of one stream."""

    # The position that the next event must have.
    received: int = 0
    # Everything before this was handed to the sink.
    delivered: int = 0
    # This connection brought everything before this: more must not be acknowledged to it.
    arrived: int = 0
    # The agent knows of everything before this.
    acked: int = 0
    # Bytes that the agent reported as dropped.
    dropped: int = 0
    ended: bool = False
    lingering: bool = False
    # Bytes are missing at the end: the stream's other side died.
    cut: bool = False


class ExecStream:
    """See the module. ``window`` is the agent's window in bytes: an acknowledgement is due after a quarter of it."""

    def __init__(self, *, window: int, streams: Iterable[int] = STREAMS) -> None:
        self._flows = {stream: _Flow() for stream in streams}
        self._ack_after = max(1, window // 4)
        self._window = window
        self.phase = Phase.RUNNING
        self.exit: Exited | None = None

    def rewind(self, stream: int, position: int) -> None:
        """Begin to watch a stream at a position other than 0. Only before its first event."""
        flow = self._flows[stream]
        flow.received = flow.delivered = flow.arrived = flow.acked = position

    def attach(self, streams: Iterable[int]) -> dict[int, int]:
        """Begin to watch streams, or go on after a lost connection: where to attach those that have not ended.

        That is behind what was delivered. What was received but not delivered comes twice, and is skipped: the agent
        must keep it as long as a sink may still read it from the shared window.
        """
        positions = {}
        for stream in streams:
            flow = self._flows.get(stream)
            if flow is not None and not flow.ended:
                positions[stream] = flow.arrived = flow.acked = flow.delivered
        return positions

    def receive(self, event: StreamEvent) -> list[Output]:
        """Take what the agent reported. Raises `FrameError` for what breaks the protocol (a hole, a chunk after the
        end)."""
        if isinstance(event, Exited):
            return self._exited(event)
        flow = self._flows.get(event.stream)
        if flow is None:
            return []
        if isinstance(event, Eof):
            return self._eof(flow, event)
        if flow.ended:
            raise FrameError("the agent sent output after the end of its stream")
        if isinstance(event, Gap):
            return self._gap(flow, event)
        return self._chunk(flow, event)

    def delivered(self, stream: int, position: int) -> list[Output]:
        """Everything before ``position`` was handed to the sink (or thrown away, if the sink failed)."""
        flow = self._flows[stream]
        flow.delivered = max(flow.delivered, min(position, flow.received))
        return [*self._acknowledge(stream, flow), *self._settle()]

    def abandon(self, exit: Exited) -> list[Output]:
        """No more events will come (the box died): end every stream where it stands; an exit that was reported stays
        authoritative."""
        outputs: list[Output] = []
        for stream, flow in self._flows.items():
            if not flow.ended:
                flow.ended = flow.cut = True
                outputs.append(Ended(stream))
        if self.exit is None:
            self.exit = exit
            self.phase = Phase.REAPED
        return outputs + self._settle()

    def dropped(self, stream: int) -> int:
        """Bytes of the stream that are known to be lost."""
        flow = self._flows.get(stream)
        return flow.dropped if flow else 0

    @property
    def incomplete(self) -> bool:
        """Whether bytes are missing from any stream."""
        return any(flow.dropped or flow.cut for flow in self._flows.values())

    @property
    def lingering(self) -> bool:
        """Whether a stream was given up while a process still held it."""
        return any(flow.lingering for flow in self._flows.values())

    # Private methods, one for each kind of event.

    def _chunk(self, flow: _Flow, event: Data | Range) -> list[Output]:
        data = event.data if isinstance(event, Data) else None
        length = len(data) if data is not None else event.length if isinstance(event, Range) else 0
        position = event.position
        if position > flow.received:
            raise FrameError(f"the agent skipped {position - flow.received} bytes of output without saying so")
        if (skip := flow.received - position) > 0:  # seen before a re-attach
            position, length = flow.received, length - skip
            data = data[skip:] if data is not None else None
        flow.arrived = max(flow.arrived, position + length)
        if length <= 0:
            return self._acknowledge(event.stream, flow)
        if data is None and length > self._window:
            raise FrameError("the agent announced more output than its window holds")
        flow.received += length
        return [Chunk(event.stream, position, length, data)]

    def _acknowledge(self, stream: int, flow: _Flow) -> list[Output]:
        position = min(flow.delivered, flow.arrived)
        if flow.ended or position - flow.acked < self._ack_after:
            return []
        flow.acked = position
        return [Ack(stream, position)]

    def _gap(self, flow: _Flow, event: Gap) -> list[Output]:
        if event.start > flow.received:
            raise FrameError("the agent reported a gap ahead of the output")
        flow.arrived = max(flow.arrived, event.end)
        count = event.end - flow.received
        if count <= 0:
            return []
        flow.dropped += count
        if flow.delivered == flow.received:  # nothing waits for its sink: the lost bytes need none
            flow.delivered = event.end
        flow.received = event.end
        return [Lost(event.stream, count)]

    def _eof(self, flow: _Flow, event: Eof) -> list[Output]:
        if flow.ended:
            return []
        if event.position != flow.received:
            raise FrameError(f"the agent ended a stream at {event.position}, but {flow.received} bytes have come")
        flow.ended = True
        flow.lingering = event.lingering
        return [Ended(event.stream), *self._settle()]

    def _exited(self, event: Exited) -> list[Output]:
        if self.exit is not None:
            return []
        self.exit = event
        self.phase = Phase.REAPED
        return self._settle()

    def _settle(self) -> list[Output]:
        if self.phase is not Phase.REAPED or self.exit is None:
            return []
        for flow in self._flows.values():
            if not flow.ended or flow.delivered < flow.received:
                return []
        self.phase = Phase.FINISHED
        return [Finished(self.exit)]
