"""Signals, timeouts and the table of executions."""

from __future__ import annotations

import os
import signal
import struct
import time
from pathlib import Path

import pytest

from .client import WINDOW, Client, Fault, Kind, shell, start_payload
from .support import Agent, gone, records, wait_for


def test_signal_goes_to_the_group(client: Client) -> None:
    client.start("a", shell("trap 'echo got; exit 3' USR1; sleep 20 & echo $!; wait"))
    seen = client.watch("a", until=lambda s: b"\n" in s.stdout)
    name = Path(f"/proc/{int(seen.stdout)}/comm")
    wait_for(lambda: name.read_text() == "sleep\n")
    assert client.signal("a", signal.SIGUSR1).type == Kind.OK
    client.watch("a", seen)
    assert seen.status == 3 and seen.stdout.endswith(b"got\n")
    assert seen.eof[1][1] == 0, "the sleeper of the same group died as well"
    assert client.signal("a", 9).failure[0] == Fault.FINISHED
    assert client.signal("nope", 9).failure[0] == Fault.NOT_FOUND


def test_signal_numbers_are_checked(client: Client) -> None:
    client.start("a", shell("read x", flags=5))
    for number in (0, 65, 2**31, 2**32 - 9):
        assert client.signal("a", number).failure[0] == Fault.INVALID


def test_timeout_terminates_and_keeps_the_output(client: Client) -> None:
    seen = client.run("a", shell("echo before; sleep 20", timeout_ms=200))
    assert (seen.stdout, seen.status, seen.timed_out) == (b"before\n", -signal.SIGTERM, True)
    assert records(client)["a"][1] & 8


def test_timeout_kills_what_ignores_it(client: Client) -> None:
    begin = time.monotonic()
    seen = client.run(
        "a", shell("trap '' TERM; echo on; while :; do sleep 0.05; done", timeout_ms=100, kill_after_ms=200)
    )
    assert (seen.stdout, seen.status, seen.timed_out) == (b"on\n", -signal.SIGKILL, True)
    assert 0.3 <= time.monotonic() - begin < 3


def test_timeout_reaches_the_group_even_after_its_leader(client: Client) -> None:
    """The leader obeys SIGTERM, a member of its group ignores it: SIGKILL still comes for it, also after FORGET."""
    for name, forget in (("a", False), ("b", True)):
        script = "(trap '' TERM; echo $BASHPID; exec sleep 20) & wait"
        payload = start_payload(["bash", "-c", script], timeout_ms=300, kill_after_ms=300, linger_ms=50)
        client.start(name, payload)
        seen = client.watch(name)
        assert seen.timed_out and seen.status == -signal.SIGTERM
        pid = int(seen.stdout)
        assert not gone(pid)
        if forget:
            assert client.request(Kind.FORGET, id=name).type == Kind.OK
        wait_for(lambda pid=pid: gone(pid), 3)  # type: ignore[misc]


def test_a_command_that_ends_in_time_is_not_marked(client: Client) -> None:
    seen = client.run("a", shell("echo x", timeout_ms=60_000))
    assert seen.status == 0 and not seen.timed_out


def test_timeouts_hold_without_a_host(agent: Agent) -> None:
    with agent.client() as first:
        first.start("a", shell("sleep 20", timeout_ms=200))
    with agent.client() as second:
        assert second.attach("a").type == Kind.ATTACHED
        assert second.watch("a").timed_out


def test_list_and_stats(client: Client) -> None:
    client.run("done", shell("exit 5"))
    client.start("live", shell("read x", flags=5))
    rows = records(client)
    assert set(rows) == {"done", "live"}
    state, flags, _pid, status, begin, end = rows["done"]
    assert (state, flags, status) == (1, 0, 5) and 0 < begin <= end
    state, flags, pid, _status, begin, end = rows["live"]
    assert (state, flags, end) == (0, 2, 0) and not gone(pid)
    reply = client.request(Kind.STATS)
    assert reply.type == Kind.STATS_OK
    processes, started, failed, output, _input, uptime, oom_kills = struct.unpack("<7Q", reply.payload)
    assert processes > 1 and (started, failed, output, oom_kills) == (2, 0, 0, 0) and uptime < 60_000


def test_unknown_and_forgotten_executions(client: Client) -> None:
    assert client.attach("nope").failure[0] == Fault.NOT_FOUND
    assert client.request(Kind.FORGET, id="nope").failure[0] == Fault.NOT_FOUND
    client.start("a", shell("read x", flags=5))
    assert client.request(Kind.FORGET, id="a").failure[0] == Fault.BUSY
    client.send(Kind.STDIN_EOF, id="a")
    client.watch("a")
    assert client.request(Kind.FORGET, id="a").type == Kind.OK
    assert client.attach("a").failure[0] == Fault.REAPED
    assert client.request(Kind.FORGET, id="a").failure[0] == Fault.REAPED
    assert client.signal("a", 9).failure[0] == Fault.FINISHED
    assert records(client) == {}


def test_forget_tells_a_watcher_that_lacks_bytes(agent: Agent, client: Client) -> None:
    with agent.client() as slow:
        slow.start("a", shell("seq 1000000"))
        taken = slow.watch("a", until=lambda s: len(s.stdout) == WINDOW, ack=False)
        client.attach("a", 0)
        client.signal("a", 9)
        assert client.next().type == Kind.EXITED
        assert client.request(Kind.FORGET, id="a").type == Kind.OK
        slow.watch("a", taken, ack=False)
        assert taken.status == -9
        assert taken.eof[1] == (taken.position[1], 1)


def test_finished_executions_are_kept_up_to_a_number(client: Client) -> None:
    for number in range(1030):
        client.run(f"e{number}", start_payload(["/bin/true"]))
    rows = records(client)
    assert len(rows) == 1024
    assert "e5" not in rows and "e6" in rows
    assert client.attach("e5").failure[0] == Fault.REAPED


def test_finished_executions_are_kept_up_to_a_size(client: Client) -> None:
    for number in range(40):
        client.run(f"e{number}", shell("head -c 500000 /dev/zero"))
    rows = records(client)
    assert "e0" not in rows and "e39" in rows
    assert len(rows) == (16 << 20) // WINDOW


def resident(pid: int) -> int:
    """Private and shared memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif("HUTCH_TEST_AGENT" in os.environ, reason="a sanitizer's memory is not ours")
def test_finished_executions_are_small(agent: Agent, client: Client) -> None:
    before = resident(agent.process.pid)
    for number in range(500):
        client.run(f"e{number}", start_payload(["/bin/echo", "x"]))
    assert (resident(agent.process.pid) - before) / 500 < 2500


def test_descriptors_do_not_leak(agent: Agent, client: Client) -> None:
    def count() -> int:
        return len(list(Path(f"/proc/{agent.process.pid}/fd").iterdir()))

    client.run("warm", shell("true", flags=5))
    before = count()
    for number in range(50):
        client.run(f"a{number}", shell("echo x"))
        client.start(f"b{number}", start_payload(["nope"]))
        client.run(f"c{number}", shell("echo x", tty=(24, 80), flags=5))
        client.run(f"d{number}", shell("exec 0<&-", flags=5))
    assert count() == before


def test_sync_answers_when_the_disk_has_everything(agent: Agent, client: Client) -> None:
    assert client.request(Kind.SYNC).type == Kind.OK
    assert client.request(Kind.SYNC, b"payload").failure[0] == Fault.INVALID
