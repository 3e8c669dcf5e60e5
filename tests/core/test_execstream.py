"""The order of one execution's output, against a model of an agent that is slow, cut, unread, and re-attached to."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hutch.core.agentproto import STDERR, STDOUT, Data, Eof, Exited, Gap, Range
from hutch.core.execstream import Ack, Chunk, Ended, ExecStream, Finished, Lost, Output, Phase, StreamEvent
from hutch.core.frames import FrameError

WINDOW = 32
STREAMS = (STDOUT, STDERR)
EXIT = Exited(3, False, 0.0, 0.0, 0.0, 0)


def byte_at(stream: int, position: int) -> int:
    """The command's output: every position of every stream is told apart from its neighbours."""
    return (position * 7 + stream * 101) % 251


def written(stream: int, start: int, end: int) -> bytes:
    return bytes(byte_at(stream, position) for position in range(start, end))


class AgentModel:
    """One stream at the agent: docs/agent-protocol.md, rules 1 to 4."""

    def __init__(self) -> None:
        self.head = self.next = self.acked = 0
        self.open = True
        self.told_end = False
        self.attached = True

    @property
    def tail(self) -> int:
        return max(0, self.head - WINDOW)

    @property
    def room(self) -> int:
        return WINDOW - (self.head - self.acked) if self.attached else WINDOW


class Watching(RuleBasedStateMachine):
    """Inputs in any legal order; what the sink sees is checked at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = ExecStream(window=WINDOW)
        self.agents = {stream: AgentModel() for stream in STREAMS}
        # What the sinks were given: (position, end) in order, not yet taken.
        self.waiting: dict[int, list[tuple[int, int]]] = {stream: [] for stream in STREAMS}
        # The position that the sink must see next.
        self.seen = dict.fromkeys(STREAMS, 0)
        self.taken = dict.fromkeys(STREAMS, 0)
        self.lost = dict.fromkeys(STREAMS, 0)
        self.ended: set[int] = set()
        self.exited = False
        self.connected = True
        self.finished = 0
        self.abandoned = False

    def apply(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert not self.finished, f"{output} after the terminal event"
            match output:
                case Chunk(stream, position, length, data):
                    assert stream not in self.ended, "output after the end of its stream"
                    assert position == self.seen[stream], "a hole or a duplicate"
                    assert length > 0
                    assert data is None or data == written(stream, position, position + length)
                    self.seen[stream] += length
                    self.waiting[stream].append((position, position + length))
                case Lost(stream, size):
                    assert size > 0
                    self.lost[stream] += size
                    self.seen[stream] += size
                case Ended(stream):
                    assert stream not in self.ended
                    self.ended.add(stream)
                case Ack(stream, position):
                    agent = self.agents[stream]
                    assert position <= self.taken[stream], "acknowledged before it was delivered"
                    if agent.attached:
                        assert position <= agent.next, "acknowledged what was not sent"
                        agent.acked = max(agent.acked, position)  # it may have dropped more than was delivered
                case Finished(exit):
                    self.finished += 1
                    assert exit == EXIT
                    assert self.exited or self.abandoned
                    assert self.ended == set(STREAMS)
                    assert not any(self.waiting.values()), "finished before everything was delivered"
                    if not self.abandoned:
                        assert all(self.seen[s] == self.agents[s].head for s in STREAMS), "finished with bytes owed"

    def feed(self, event: StreamEvent) -> None:
        self.apply(self.machine.receive(event))

    @rule(stream=st.sampled_from(STREAMS), size=st.integers(1, 2 * WINDOW))
    def write(self, stream: int, size: int) -> None:
        """The command writes; while it is watched, no more than the window takes."""
        agent = self.agents[stream]
        if agent.open:
            agent.head += min(size, agent.room)

    @precondition(lambda self: not self.finished)
    @rule(stream=st.sampled_from(STREAMS), size=st.integers(1, WINDOW), shared=st.booleans())
    def send(self, stream: int, size: int, shared: bool) -> None:
        agent = self.agents[stream]
        size = min(size, agent.head - agent.next)
        if not agent.attached or size <= 0 or agent.told_end:
            return
        position, agent.next = agent.next, agent.next + size
        if shared:
            self.feed(Range(stream, position, size))
        else:
            self.feed(Data(stream, position, written(stream, position, position + size)))

    @precondition(lambda self: not self.finished)
    @rule(stream=st.sampled_from(STREAMS))
    def close(self, stream: int) -> None:
        self.agents[stream].open = False

    @precondition(lambda self: not self.finished)
    @rule(stream=st.sampled_from(STREAMS), lingering=st.booleans())
    def send_end(self, stream: int, lingering: bool) -> None:
        agent = self.agents[stream]
        if agent.attached and not agent.open and agent.next == agent.head and not agent.told_end:
            agent.told_end = True
            self.feed(Eof(stream, agent.head, lingering))

    @precondition(lambda self: not self.finished)
    @rule()
    def exit(self) -> None:
        """The process ends; the notice may overtake output, and is repeated after a re-attach."""
        self.exited = True
        if not self.connected:
            return
        self.feed(EXIT)

    @rule(stream=st.sampled_from(STREAMS), pieces=st.integers(1, 5))
    def take(self, stream: int, pieces: int) -> None:
        """The sink takes some of what waits for it."""
        for _ in range(min(pieces, len(self.waiting[stream]))):
            _, end = self.waiting[stream].pop(0)
            self.taken[stream] = end
            self.apply(self.machine.delivered(stream, end))

    @precondition(lambda self: not self.finished)
    @rule()
    def cut(self) -> None:
        self.connected = False
        for agent in self.agents.values():
            agent.attached = False

    @precondition(lambda self: not self.finished)
    @rule()
    def attach_again(self) -> None:
        """A new connection: from the machine's positions, with a gap where the agent dropped bytes meanwhile."""
        self.connected = True
        positions = self.machine.attach(STREAMS)
        assert set(positions) == set(STREAMS) - self.ended
        for stream, position in positions.items():
            agent = self.agents[stream]
            assert position <= self.seen[stream]
            assert position >= self.taken[stream], "delivered bytes are asked for again"
            agent.attached = True
            agent.told_end = False
            agent.next = agent.acked = max(position, agent.tail)
            if position < agent.next:
                self.feed(Gap(stream, position, agent.next))
        if self.exited:
            self.feed(EXIT)

    @precondition(lambda self: not self.finished)
    @rule()
    def abandon(self) -> None:
        """The box dies."""
        self.abandoned = True
        for agent in self.agents.values():
            agent.open = agent.attached = False
            agent.told_end = True
        self.apply(self.machine.abandon(EXIT))

    @invariant()
    def phases(self) -> None:
        assert (self.machine.phase is Phase.FINISHED) == (self.finished == 1)
        for stream in STREAMS:
            assert self.machine.dropped(stream) == self.lost[stream]
        if any(self.lost.values()):
            assert self.machine.incomplete, "a gap was not told"

    @invariant()
    def window_law(self) -> None:
        """A slow sink holds back its stream: what is on its way to it never exceeds what the window allows."""
        for agent in self.agents.values():
            if agent.attached:
                unacked = agent.next - agent.acked
                assert unacked <= WINDOW

    def teardown(self) -> None:
        """Whatever has happened: let everybody do their part, and the end comes, once."""
        if self.finished:
            return
        for agent in self.agents.values():
            agent.open = False
        if not self.connected:
            self.attach_again()
        for _ in range(200):
            for stream in STREAMS:
                self.send(stream, WINDOW, False)
                self.take(stream, 100)
                if not self.finished:
                    self.send_end(stream, False)
            if not self.finished:
                self.exit()
            if self.finished:
                break
        assert self.machine.phase is Phase.FINISHED, "the end never came"


Watching.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestWatching = Watching.TestCase


def finished(outputs: list[Output]) -> bool:
    return any(isinstance(output, Finished) for output in outputs)


def test_exit_waits_for_the_drain_of_both_streams() -> None:
    machine = ExecStream(window=WINDOW)
    assert machine.receive(Data(STDOUT, 0, b"abc")) == [Chunk(STDOUT, 0, 3, b"abc")]
    assert machine.receive(EXIT) == []
    assert machine.phase is Phase.REAPED
    assert machine.receive(Eof(STDOUT, 3, False)) == [Ended(STDOUT)]
    assert machine.receive(Eof(STDERR, 0, True)) == [Ended(STDERR)]
    assert machine.delivered(STDOUT, 2) == []
    assert machine.delivered(STDOUT, 3) == [Finished(EXIT)]
    assert machine.receive(EXIT) == []
    assert machine.lingering


@pytest.mark.parametrize(
    "events",
    [
        [Data(STDOUT, 1, b"x")],
        [Data(STDOUT, 0, b"abc"), Data(STDOUT, 4, b"x")],
        [Gap(STDOUT, 1, 2)],
        [Eof(STDOUT, 1, False)],
        [Data(STDOUT, 0, b"abc"), Eof(STDOUT, 2, False)],
        [Eof(STDOUT, 0, False), Data(STDOUT, 0, b"x")],
        [Eof(STDOUT, 0, False), Gap(STDOUT, 0, 3)],
        [Range(STDOUT, 0, WINDOW + 1)],
    ],
)
def test_what_an_agent_must_not_send_is_refused(events: list[StreamEvent]) -> None:
    machine = ExecStream(window=WINDOW)
    with pytest.raises(FrameError):
        for event in events:
            machine.receive(event)


def test_a_stream_that_nobody_asked_about_is_ignored() -> None:
    machine = ExecStream(window=WINDOW, streams=(STDOUT,))
    assert machine.receive(Data(STDERR, 0, b"x")) == []
    assert machine.receive(EXIT) == []
    assert finished(machine.receive(Eof(STDOUT, 0, False)))


def test_a_late_watcher_begins_where_it_says() -> None:
    machine = ExecStream(window=WINDOW)
    machine.rewind(STDOUT, 10)
    assert machine.attach(STREAMS) == {STDOUT: 10, STDERR: 0}
    assert machine.receive(Data(STDOUT, 8, b"abcd")) == [Chunk(STDOUT, 10, 2, b"cd")]
    assert machine.receive(Gap(STDERR, 0, 5)) == [Lost(STDERR, 5)]
    assert (machine.dropped(STDERR), machine.incomplete) == (5, True)
    assert machine.attach([STDOUT, STDERR]) == {STDOUT: 10, STDERR: 5}


def test_an_exit_that_was_reported_outlives_the_box() -> None:
    machine = ExecStream(window=WINDOW)
    machine.receive(EXIT)
    outputs = machine.abandon(Exited(-9, False, 0.0, 0.0, 0.0, 0))
    assert outputs[-1] == Finished(EXIT)
    assert machine.incomplete
