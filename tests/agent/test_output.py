"""Order, drain and linger."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from .client import FOREVER, WINDOW, Client, Kind, shell, start_payload
from .support import Agent, counter, expected

if TYPE_CHECKING:
    from pathlib import Path


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
    client.ack("a", 1, len(seen.stdout))
    client.watch("a", seen)
    assert seen.stdout == expected(WINDOW)


def test_pipe_is_drained_after_the_exit_however_slowly_it_is_read(client: Client) -> None:
    """The process ended with more in the pipe than the window takes: nothing of it is lost."""
    size = WINDOW + 32768
    client.start("a", shell(f"{counter(size)}; exit 4"))
    seen = client.watch("a", until=lambda s: s.exited is not None and len(s.stdout) == WINDOW and 2 in s.eof, ack=False)
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
    assert client.signal("a", 9).type == Kind.OK
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
        assert client.start(f"e{number}", shell(f"for i in 1 2 3 4 5; do echo {number} $i; done")).type == Kind.STARTED
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
