"""Windows, gaps, several watchers, broken connections and shared memory."""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

from .client import WINDOW, Client, Fault, Kind, Watched, shell, start_payload
from .support import Agent, counter, expected, gone, wait_for

if TYPE_CHECKING:
    from pathlib import Path


def test_nothing_is_dropped_before_the_first_watcher(agent: Agent, client: Client, tmp_path: Path) -> None:
    done = tmp_path / "done"
    size = 16 * 130_000  # more than the window and the widest pipe
    client.start("a", shell(f"{counter(size)}; touch {done}", flags=0))
    assert client.idle(0.2), "output or exit although nobody watches and the window is full"
    assert not done.exists()
    assert client.attach("a").type == Kind.ATTACHED
    seen = client.watch("a")
    assert seen.stdout == expected(size)
    assert not seen.gaps[1]


def test_an_unwatched_command_runs_on_and_the_gap_is_told(client: Client) -> None:
    size = 16 * 120_000
    client.start("a", shell(counter(size), flags=0))
    first = client.next()
    assert first.type == Kind.EXITED, "the starter is told of the exit without watching"
    attached = client.attach("a")
    assert attached.type == Kind.ATTACHED and attached.payload[4] == 1
    seen = client.watch("a")
    assert seen.gaps[1] == [(0, size - WINDOW)]
    assert seen.stdout == expected(size)[-WINDOW:]
    assert seen.eof[1] == (size, 0)


def test_detach_lets_the_command_run_on_at_once(client: Client) -> None:
    client.start("a", shell("seq 1000000; exit 3"))
    seen = client.watch("a", until=lambda s: len(s.stdout) == WINDOW, ack=False)
    begin = time.monotonic()
    assert client.detach("a").type == Kind.OK
    client.watch("a", seen, until=lambda s: s.exited is not None, ack=False)
    assert time.monotonic() - begin < 5
    assert seen.status == 3


def test_a_broken_connection_loses_nothing(agent: Agent) -> None:
    """What the lost watcher had not acknowledged is kept for the next one, which gets each later byte once."""
    size = 16 * 200_000
    with agent.client() as first:
        first.start("a", shell(counter(size)))
        seen = first.watch("a", until=lambda s: len(s.stdout) >= 300_000)
    with agent.client() as second:
        assert second.idle(0.2), "time enough to overrun the window"
        assert second.attach("a", 3, len(seen.stdout), 0).type == Kind.ATTACHED
        second.watch("a", seen)
    assert not seen.gaps[1]
    assert seen.stdout == expected(size)
    assert seen.status == 0


def test_after_the_hold_time_a_lost_watcher_no_longer_holds_the_command(agent: Agent) -> None:
    with agent.client() as first:
        first.start("a", shell("seq 1000000; exit 3"))
        first.watch("a", until=lambda s: len(s.stdout) >= 300_000)
    with agent.client() as second:
        assert second.attach("a", 0).type == Kind.ATTACHED
        exited = second.next()
        assert exited.type == Kind.EXITED and exited.i32() == 3


def test_two_watchers_both_get_everything(agent: Agent, client: Client) -> None:
    size = 16 * 150_000
    with agent.client() as other:
        client.start("a", shell(f"read x; {counter(size)}", flags=5))
        assert other.attach("a").type == Kind.ATTACHED
        client.send(6, b"go\n", id="a")
        result: list[Watched] = []
        thread = threading.Thread(target=lambda: result.append(other.watch("a")))
        thread.start()
        mine = client.watch("a")
        thread.join(20)
        assert mine.stdout == result[0].stdout == expected(size)


def test_a_late_watcher_gets_the_backlog_and_the_exit(agent: Agent, client: Client) -> None:
    client.run("a", shell("echo out; echo err >&2; exit 9"))
    with agent.client() as late:
        attached = late.attach("a", 3, 1, 0)
        assert attached.type == Kind.ATTACHED and attached.payload[4] == 1
        second = late.next()
        assert second.type == Kind.EXITED and second.i32() == 9
        late.pending.insert(0, second)
        seen = Watched()
        seen.position[1] = 1
        late.watch("a", seen)
        assert (seen.stdout, seen.stderr) == (b"ut\n", b"err\n")


def test_events_only(agent: Agent, client: Client) -> None:
    client.start("a", shell("read x; echo out; exit 2", flags=5))
    with agent.client() as other:
        assert other.attach("a", 0).type == Kind.ATTACHED
        client.send(6, b"\n", id="a")
        assert client.watch("a").stdout == b"out\n"
        seen = other.watch("a", until=lambda s: s.exited is not None)
        assert seen.status == 2 and seen.stdin_closed
        assert other.idle(0.1)


def test_attach_beyond_the_end_is_refused(client: Client) -> None:
    client.start("a", shell("echo hello; read x", flags=5))
    client.watch("a", until=lambda s: len(s.stdout) == 6)
    assert client.attach("a", 1, 7).failure[0] == Fault.INVALID


def test_acknowledging_what_was_not_sent_ends_the_connection(agent: Agent, client: Client) -> None:
    with agent.client() as bad:
        bad.start("a", shell("read x", flags=5))
        bad.ack("a", 1, 1)
        with pytest.raises(EOFError):
            bad.next()
    assert client.run("b", shell("echo fine")).stdout == b"fine\n"


def shared_window(client: Client, id: str, stream: int = 1) -> None:
    reply = client.request(Kind.SHM, stream=stream, id=id)
    assert reply.type == Kind.SHM_OK and reply.u32() == WINDOW
    fd = client.fds.pop()
    assert os.fstat(fd).st_size == WINDOW
    with pytest.raises(OSError):
        os.ftruncate(fd, 4096)
    client.windows[id, stream] = memoryview(mmap.mmap(fd, WINDOW, prot=mmap.PROT_READ))
    os.close(fd)


def test_shared_memory_carries_the_same_bytes(client: Client) -> None:
    size = 16 * 400_000
    client.start("a", shell(f"echo first; read x; {counter(size)}", flags=5))
    seen = client.watch("a", until=lambda s: s.stdout == b"first\n", ack=False)
    shared_window(client, "a")
    client.send(6, b"\n", id="a")
    kinds = set()
    while not seen.complete:
        frame = client.next()
        kinds.add(frame.type)
        client.take(seen, frame)
    assert Kind.RANGE in kinds and Kind.DATA not in kinds
    assert seen.stdout == b"first\n" + expected(size)


def test_shared_memory_of_a_running_window_keeps_what_is_in_it(agent: Agent, client: Client) -> None:
    """The window becomes a memfd while it holds bytes that wrap: a second watcher reads them all."""
    size = WINDOW + 16 * 1000
    client.start("a", shell(f"{counter(size)}; read x", flags=5))
    client.watch("a", until=lambda s: len(s.stdout) == size)
    shared_window(client, "a")
    with agent.client() as other:
        assert other.attach("a").type == Kind.ATTACHED
        seen = other.watch("a", until=lambda s: len(s.stdout) == WINDOW)
        assert seen.gaps[1] == [(0, 16 * 1000)]
        assert seen.stdout == expected(size)[-WINDOW:]


def test_shared_memory_needs_an_attached_stream(client: Client) -> None:
    client.start("a", shell("read x", flags=1))
    assert client.request(Kind.SHM, stream=1, id="a").failure[0] == Fault.INVALID
    client.run("b", shell("true"))
    assert client.request(Kind.SHM, stream=1, id="b").failure[0] == Fault.FINISHED
    assert client.request(Kind.SHM, stream=0, id="a").failure[0] == Fault.INVALID


def test_data_frames_interleave_streams(client: Client) -> None:
    """Round-robin: neither stream waits for the other to be exhausted."""
    client.start("a", shell("seq 300000 & seq 300000 >&2; wait"))
    seen = client.watch("a")
    assert seen.stdout == seen.stderr == b"".join(b"%d\n" % i for i in range(1, 300001))


def test_frames_of_a_stream_are_a_partition(client: Client) -> None:
    """Raw check without the client's own bookkeeping: positions follow each other, EOF is last, EXITED once."""
    client.start("a", shell("seq 100000"))
    position = 0
    kinds: list[int] = []
    while kinds.count(Kind.EOF) < 2 or Kind.EXITED not in kinds:
        frame = client.next()
        kinds.append(frame.type)
        if frame.type == Kind.DATA and frame.stream == 1:
            assert frame.u64() == position
            position += len(frame.payload) - 8
            client.ack("a", 1, position)
    assert kinds.count(Kind.EXITED) == 1 and Kind.GAP not in kinds and Kind.FAILED not in kinds
    assert position == len(b"".join(b"%d\n" % i for i in range(1, 100001)))


def test_exit_frame_carries_usage(client: Client) -> None:
    before = time.time_ns()
    seen = client.run("a", start_payload(["python3", "-c", "sum(range(3_000_000))"]))
    assert seen.exited is not None
    unix_ns, user_us, _system_us, max_rss = struct.unpack_from("<QQQQ", seen.exited.payload, 8)
    assert before <= unix_ns <= time.time_ns()
    assert user_us > 10_000
    assert 1 << 20 < max_rss < 1 << 30


def test_orphans_do_not_confuse_the_agent(client: Client, tmp_path: Path) -> None:
    """A daemon that left its execution is reaped without effect on any execution."""
    mark = tmp_path / "pid"
    client.run(
        "a", shell(f"setsid sh -c 'echo $$ >{mark}.new; mv {mark}.new {mark}; sleep 0.2; exit 77' >/dev/null 2>&1 &")
    )
    wait_for(mark.exists)
    pid = int(mark.read_text())
    wait_for(lambda: gone(pid))
    assert client.run("b", shell("exit 1")).status == 1
