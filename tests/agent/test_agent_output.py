"""Order, drain, windows, gaps, watchers and shared memory: the output side of docs/agent-protocol.md."""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

from .client import (
    ATTACHED, DATA, EOF, EXITED, FAILED, FINISHED, FOREVER, GAP, INVALID, OK, RANGE, SHM, SHM_OK, STARTED, WINDOW,
    Agent, Client, Watched, gone, start_payload, wait_for,
)  # fmt: skip

if TYPE_CHECKING:
    from pathlib import Path


def shell(script: str, **options: object) -> bytes:
    return start_payload(["sh", "-c", script], **options)  # type: ignore[arg-type]


def counter(size: int) -> str:
    """Shell words that write `size` bytes without two equal lines; `expected` is what they write."""
    return f"seq -f %015.0f 0 {size // 16 - 1}"


def expected(size: int) -> bytes:
    return b"".join(b"%015d\n" % i for i in range(size // 16))


def test_both_streams_and_the_exit_code_arrive(client: Client) -> None:
    seen = client.run("a", shell("printf out; printf err >&2; exit 7"))
    assert (seen.stdout, seen.stderr, seen.status) == (b"out", b"err", 7)
    assert seen.eof == {1: (3, 0), 2: (3, 0)}
    assert not seen.timed_out


def test_death_by_signal_is_a_negative_status(client: Client) -> None:
    assert client.run("a", shell("kill -9 $$")).status == -9
    assert client.run("b", shell("kill -SEGV $$")).status == -11


def test_bytes_are_bytes(client: Client) -> None:
    everything = bytes(range(256)) * 3
    script = "import os; os.write(1, bytes(range(256)) * 3)"
    assert client.run("a", start_payload(["python3", "-c", script])).stdout == everything


def test_much_output_is_whole_and_in_order(client: Client) -> None:
    size = 16 * 400_000
    seen = client.run("a", shell(counter(size)))
    assert seen.stdout == expected(size)


def test_output_before_the_exit_is_never_lost(agent: Agent) -> None:
    """Thousands of short commands, eight at a time: each output equals its nonce."""
    wrong: list[str] = []

    def work(lane: int) -> None:
        with agent.client(30.0) as client:
            for number in range(250):
                nonce = f"{lane}x{number}"
                seen = client.run(nonce, start_payload(["/bin/echo", nonce]))
                if seen.stdout != nonce.encode() + b"\n" or seen.status != 0:
                    wrong.append(nonce)

    lanes = [threading.Thread(target=work, args=(lane,)) for lane in range(8)]
    for thread in lanes:
        thread.start()
    for thread in lanes:
        thread.join(50)
    assert not any(thread.is_alive() for thread in lanes)
    assert wrong == []


def test_exit_is_reported_ahead_of_a_full_window(client: Client) -> None:
    """EXITED does not wait for data that the watcher has not taken."""
    client.start("a", shell(f"{counter(WINDOW)}; exit 3"))
    seen = client.watch("a", until=lambda s: s.exited is not None, ack=False)
    assert seen.status == 3
    assert 1 not in seen.eof or len(seen.stdout) == WINDOW
    client.watch("a", seen)
    assert seen.stdout == expected(WINDOW)


def test_pipe_is_drained_after_the_exit_however_slowly_it_is_read(client: Client) -> None:
    """The process ended with more in the pipe than the window takes: nothing of it is lost."""
    size = WINDOW + 32768
    client.start("a", shell(f"{counter(size)}; exit 4"))
    seen = client.watch("a", until=lambda s: s.exited is not None and len(s.stdout) == WINDOW, ack=False)
    assert client.idle(0.6), "the quiet clock runs although the window is full"
    client.ack("a", 1, len(seen.stdout))
    client.watch("a", seen)
    assert seen.stdout == expected(size)
    assert seen.eof[1] == (size, 0)


def test_unacknowledged_output_blocks_the_process(client: Client, tmp_path: Path) -> None:
    done = tmp_path / "done"
    client.start("a", shell(f"{counter(4 * WINDOW)}; touch {done}"))
    seen = client.watch("a", until=lambda s: len(s.stdout) == WINDOW, ack=False)
    assert client.idle(0.3)
    assert not done.exists()
    client.ack("a", 1, WINDOW)
    client.watch("a", seen)
    assert seen.stdout == expected(4 * WINDOW)


def test_a_stalled_stream_blocks_neither_the_other_stream_nor_signals(client: Client) -> None:
    client.start("a", shell("(head -c 2000000 /dev/zero &); sleep 0.1; echo alive >&2; read x", flags=5))
    seen = client.watch("a", until=lambda s: bool(s.stderr) and len(s.stdout) == WINDOW, ack=False)
    assert seen.stderr == b"alive\n"
    assert client.signal("a", 9).type == OK
    client.watch("a", seen, until=lambda s: s.exited is not None, ack=False)
    assert seen.status == -9


def test_a_slow_watcher_blocks_no_other_execution(agent: Agent, client: Client) -> None:
    with agent.client() as slow:
        for number in range(4):
            slow.start(f"slow{number}", shell("head -c 3000000 /dev/zero"))
        begin = time.monotonic()
        assert len(client.run("fast", shell(counter(1_600_000))).stdout) == 1_600_000
        assert time.monotonic() - begin < 5


def test_one_connection_carries_many_executions_at_once(client: Client) -> None:
    for number in range(20):
        assert client.start(f"e{number}", shell(f"for i in 1 2 3 4 5; do echo {number} $i; done")).type == STARTED
    for number in range(20):
        want = b"".join(b"%d %d\n" % (number, i) for i in range(1, 6))
        assert client.watch(f"e{number}").stdout == want


def test_a_background_child_is_waited_for_only_while_it_writes(client: Client) -> None:
    client.start("a", shell("sleep 30 & echo $!; exit 5", linger_ms=150))
    seen = client.watch("a")
    assert seen.status == 5
    assert seen.eof[1] == (len(seen.stdout), 1)
    assert seen.events.index("exited") < seen.events.index("eof")
    os.kill(int(seen.stdout), 9)


def test_each_late_byte_restarts_the_quiet_clock(client: Client) -> None:
    client.start("a", shell("(for i in 1 2 3 4; do sleep 0.2; echo $i; done) & exit 0", linger_ms=500))
    seen = client.watch("a")
    assert seen.stdout == b"1\n2\n3\n4\n"
    assert seen.eof[1] == (8, 0)


def test_output_slower_than_the_linger_time_is_not_cut_before_the_exit(client: Client) -> None:
    seen = client.run("a", shell("echo 1; sleep 0.3; echo 2", linger_ms=50))
    assert seen.stdout == b"1\n2\n"


def test_linger_zero_still_delivers_what_the_command_wrote(client: Client) -> None:
    size = 16 * 50_000
    client.start("a", shell(f"sleep 30 & echo $! >&2; {counter(size)}", linger_ms=0))
    seen = client.watch("a")
    assert seen.stdout == expected(size)
    assert seen.eof[1][1] == 1
    os.kill(int(seen.stderr), 9)


def test_linger_forever_waits_for_the_end(client: Client) -> None:
    client.start("a", shell("(sleep 0.6; echo late) & exit 0", linger_ms=FOREVER))
    seen = client.watch("a")
    assert seen.stdout == b"late\n"
    assert seen.eof[1] == (5, 0)


def test_nothing_is_dropped_before_the_first_watcher(agent: Agent, client: Client, tmp_path: Path) -> None:
    done = tmp_path / "done"
    size = 16 * 60_000
    client.start("a", shell(f"{counter(size)}; touch {done}", flags=0))
    assert client.idle(0.2), "output or exit although nobody watches and the window is full"
    assert not done.exists()
    assert client.attach("a").type == ATTACHED
    seen = client.watch("a")
    assert seen.stdout == expected(size)
    assert not seen.gaps[1]


def test_an_unwatched_command_runs_on_and_the_gap_is_told(client: Client) -> None:
    size = 16 * 120_000
    client.start("a", shell(counter(size), flags=0))
    first = client.next()
    assert first.type == EXITED, "the starter is told of the exit without watching"
    attached = client.attach("a")
    assert attached.type == ATTACHED and attached.payload[4] == 1
    seen = client.watch("a")
    assert seen.gaps[1] == [(0, size - WINDOW)]
    assert seen.stdout == expected(size)[-WINDOW:]
    assert seen.eof[1] == (size, 0)


def test_detach_lets_the_command_run_on_at_once(client: Client) -> None:
    client.start("a", shell("seq 1000000; exit 3"))
    seen = client.watch("a", until=lambda s: len(s.stdout) == WINDOW, ack=False)
    begin = time.monotonic()
    assert client.detach("a").type == OK
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
        assert second.attach("a", 3, len(seen.stdout), 0).type == ATTACHED
        second.watch("a", seen)
    assert not seen.gaps[1]
    assert seen.stdout == expected(size)
    assert seen.status == 0


def test_after_the_hold_time_a_lost_watcher_no_longer_holds_the_command(agent: Agent) -> None:
    with agent.client() as first:
        first.start("a", shell("seq 1000000; exit 3"))
        first.watch("a", until=lambda s: len(s.stdout) >= 300_000)
    with agent.client() as second:
        assert second.attach("a", 0).type == ATTACHED
        exited = second.next()
        assert exited.type == EXITED and exited.i32() == 3


def test_two_watchers_both_get_everything(agent: Agent, client: Client) -> None:
    size = 16 * 150_000
    with agent.client() as other:
        client.start("a", shell(f"read x; {counter(size)}", flags=5))
        assert other.attach("a").type == ATTACHED
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
        assert attached.type == ATTACHED and attached.payload[4] == 1
        second = late.next()
        assert second.type == EXITED and second.i32() == 9
        late.pending.insert(0, second)
        seen = Watched()
        seen.position[1] = 1
        late.watch("a", seen)
        assert (seen.stdout, seen.stderr) == (b"ut\n", b"err\n")


def test_events_only(agent: Agent, client: Client) -> None:
    client.start("a", shell("read x; echo out; exit 2", flags=5))
    with agent.client() as other:
        assert other.attach("a", 0).type == ATTACHED
        client.send(6, b"\n", id="a")
        assert client.watch("a").stdout == b"out\n"
        exited = other.next()
        assert exited.type == EXITED and exited.i32() == 2
        assert other.idle(0.1)


def test_attach_beyond_the_end_is_refused(client: Client) -> None:
    client.start("a", shell("echo hello; read x", flags=5))
    client.watch("a", until=lambda s: len(s.stdout) == 6)
    assert client.attach("a", 1, 7).failure[0] == INVALID


def test_acknowledging_what_was_not_sent_ends_the_connection(agent: Agent, client: Client) -> None:
    with agent.client() as bad:
        bad.start("a", shell("read x", flags=5))
        bad.ack("a", 1, 1)
        with pytest.raises(EOFError):
            bad.next()
    assert client.run("b", shell("echo fine")).stdout == b"fine\n"


def shared_window(client: Client, id: str, stream: int = 1) -> None:
    reply = client.request(SHM, stream=stream, id=id)
    assert reply.type == SHM_OK and reply.u32() == WINDOW
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
    assert RANGE in kinds and DATA not in kinds
    assert seen.stdout == b"first\n" + expected(size)


def test_shared_memory_of_a_running_window_keeps_what_is_in_it(agent: Agent, client: Client) -> None:
    """The window becomes a memfd while it holds bytes that wrap: a second watcher reads them all."""
    size = WINDOW + 16 * 1000
    client.start("a", shell(f"{counter(size)}; read x", flags=5))
    client.watch("a", until=lambda s: len(s.stdout) == size)
    shared_window(client, "a")
    with agent.client() as other:
        assert other.attach("a").type == ATTACHED
        seen = other.watch("a", until=lambda s: len(s.stdout) == WINDOW)
        assert seen.gaps[1] == [(0, 16 * 1000)]
        assert seen.stdout == expected(size)[-WINDOW:]


def test_shared_memory_needs_an_attached_stream(client: Client) -> None:
    client.start("a", shell("read x", flags=1))
    assert client.request(SHM, stream=1, id="a").failure[0] == INVALID
    client.run("b", shell("true"))
    assert client.request(SHM, stream=1, id="b").failure[0] == FINISHED
    assert client.request(SHM, stream=0, id="a").failure[0] == INVALID


def test_data_frames_interleave_streams(client: Client) -> None:
    """Round-robin: neither stream waits for the other to be exhausted."""
    client.start("a", shell("seq 300000 & seq 300000 >&2; wait"))
    seen = client.watch("a")
    assert seen.stdout == seen.stderr == b"".join(b"%d\n" % i for i in range(1, 300001))


def test_frames_of_a_stream_are_a_partition(client: Client) -> None:
    """Raw check without the client's own bookkeeping: positions follow each other, EOF is last, EXITED once."""
    client.start("a", shell("seq 100000"))
    position, kinds = 0, []
    while kinds.count(EOF) < 2 or EXITED not in kinds:
        frame = client.next()
        kinds.append(frame.type)
        if frame.type == DATA and frame.stream == 1:
            assert frame.u64() == position
            position += len(frame.payload) - 8
            client.ack("a", 1, position)
    assert kinds.count(EXITED) == 1 and GAP not in kinds and FAILED not in kinds
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
    client.run("a", shell(f"setsid sh -c 'echo $$ >{mark}.new; mv {mark}.new {mark}; sleep 0.2; exit 77' >/dev/null 2>&1 &"))
    wait_for(mark.exists)
    pid = int(mark.read_text())
    wait_for(lambda: gone(pid))
    assert client.run("b", shell("exit 1")).status == 1
