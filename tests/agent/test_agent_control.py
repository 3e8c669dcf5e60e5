"""Starting, stdin, terminals, signals, timeouts, retention, main command and power-off: docs/agent-protocol.md."""

from __future__ import annotations

import os
import pwd
import random
import re
import resource
import signal
import struct
import time
from typing import TYPE_CHECKING

import pytest

from .client import (
    ACK, ATTACHED, BAD_CWD, BAD_USER, BUSY, COMMAND_NOT_FOUND, DATA, EOF, EXECS, EXISTS, EXITED, FAILED, FINISHED,
    FORGET, HEADER, HELLO, HELLO_OK, INVALID, LIST, MAIN, NOT_EXECUTABLE, NOT_FOUND, OK, PING, PONG, POWEROFF, REAPED,
    START, START_FAILED, STARTED, STATS, STATS_OK, STDIN, STDIN_EOF, UNSUPPORTED, WATCH, WINDOW, WITH_STDIN,
    Agent, Client, Watched, gone, running_agent, start_payload, wait_for,
)  # fmt: skip

if TYPE_CHECKING:
    from pathlib import Path


def shell(script: str, **options: object) -> bytes:
    return start_payload(["sh", "-c", script], **options)  # type: ignore[arg-type]


def records(client: Client) -> dict[str, tuple[int, ...]]:
    """LIST: id -> state, flags, pid, status, start, end."""
    reply = client.request(LIST)
    assert reply.type == EXECS and len(reply.payload) % 40 == 0
    rows = struct.iter_unpack("<12sBBHIiQQ", reply.payload)
    return {row[0].rstrip(b"\0").decode(): (row[1], row[2], *row[4:]) for row in rows}


# --- connection ---------------------------------------------------------------------------------


def test_hello(client: Client) -> None:
    reply = client.request(HELLO, struct.pack("<I", 1))
    assert reply.type == HELLO_OK
    assert struct.unpack("<IIII", reply.payload)[:3] == (1, WINDOW, 1)
    assert client.request(HELLO, struct.pack("<I", 2)).failure[0] == UNSUPPORTED


def test_ping(client: Client) -> None:
    assert client.request(PING, b"x" * 64) == client.request(PING, b"x" * 64).__class__(PONG, 0, 1, "", b"x" * 64)
    assert client.request(PING, b"x" * 65).failure[0] == INVALID


BAD_FRAMES = {
    "length": HEADER.pack((1 << 20) + 1, PING, 0, 0, 1, b""),
    "type 0": HEADER.pack(0, 0, 0, 0, 1, b""),
    "unknown type": HEADER.pack(0, 16, 0, 0, 1, b""),
    "reply type": HEADER.pack(0, OK, 0, 0, 1, b""),
    "stream": HEADER.pack(0, PING, 3, 0, 1, b""),
    "zero": HEADER.pack(0, PING, 0, 1, 1, b""),
    "id character": HEADER.pack(0, PING, 0, 0, 1, b"a-b"),
    "id hole": HEADER.pack(0, PING, 0, 0, 1, b"a\0b"),
    "ack size": HEADER.pack(4, ACK, 1, 0, 0, b"a") + b"1234",
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_malformed_frame_ends_only_its_connection(agent: Agent, client: Client, name: str) -> None:
    with agent.client() as bad:
        bad.send_raw(BAD_FRAMES[name])
        with pytest.raises((EOFError, ConnectionResetError)):
            bad.next()
    assert client.request(PING).type == PONG


def test_garbage_never_ends_the_agent(agent: Agent, client: Client) -> None:
    """Random bytes, and random but well-formed frames (except START and POWEROFF, which would do what they say)."""
    chance = random.Random(7)
    kinds = [k for k in range(1, 16) if k not in (START, POWEROFF)]
    client.start("a", shell("cat", flags=5))
    for round in range(60):
        with agent.client() as bad:
            try:
                if round % 2:
                    bad.send_raw(chance.randbytes(2000))
                for _ in range(50):
                    payload = chance.randbytes(chance.choice((0, 1, 4, 8, 17)))
                    bad.send(chance.choice(kinds), payload, stream=chance.randrange(3), req=chance.randrange(9), id="a")
            except OSError:
                pass  # disconnected, as it should be
    assert client.request(PING).type == PONG
    assert agent.alive


def test_start_attributes_fuzz(agent: Agent, client: Client) -> None:
    """Cut and bent START payloads: an answer or a disconnect, never a dead agent."""
    chance = random.Random(11)
    whole = start_payload(["/bin/true"], cwd="/", user="0:0", flags=0, timeout_ms=5, limits=[(7, 64, 64)])
    for number in range(300):
        bent = bytearray(whole[: chance.randrange(len(whole) + 1)])
        for _ in range(chance.randrange(3)):
            if bent:
                bent[chance.randrange(len(bent))] = chance.randrange(256)
        assert client.start(f"f{number}", bytes(bent)).type in (STARTED, FAILED)
    assert agent.alive


def test_a_frame_may_arrive_byte_by_byte(client: Client) -> None:
    frame = HEADER.pack(3, PING, 0, 0, 77, b"") + b"abc"
    for byte in frame:
        client.send_raw(bytes([byte]))
    assert client.reply(77).payload == b"abc"


def test_connection_flood_is_capped(agent: Agent, client: Client) -> None:
    assert client.request(PING).type == PONG
    flood = [agent.client() for _ in range(100)]
    closed = 0
    for other in flood:
        try:
            closed += other.request(PING).type != PONG
        except (EOFError, OSError):
            closed += 1
    assert closed == 100 - 63
    for other in flood:
        other.close()
    assert client.request(PING).type == PONG
    with agent.client() as again:
        assert again.request(PING).type == PONG


def test_a_host_that_reads_nothing_is_disconnected_at_last(agent: Agent, client: Client) -> None:
    with agent.client(20.0) as deaf, pytest.raises(OSError):
        for _ in range(200_000):
            deaf.send(PING, b"x" * 64, req=1)
    assert client.request(PING).type == PONG


# --- start --------------------------------------------------------------------------------------


def test_start_failures_are_typed(client: Client, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("echo\n")
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fnot a program")
    broken.chmod(0o755)
    orphaned = tmp_path / "orphaned"
    orphaned.write_text("#!/no/such/interpreter\n")
    orphaned.chmod(0o755)
    cases = [
        (start_payload(["foo-not-there"]), COMMAND_NOT_FOUND, "command not found: 'foo-not-there'"),
        (start_payload(["/no/such"]), COMMAND_NOT_FOUND, "command not found: '/no/such'"),
        (start_payload([""]), COMMAND_NOT_FOUND, "command not found: ''"),
        (start_payload(["/etc/passwd/x"]), COMMAND_NOT_FOUND, "'/etc/passwd/x'"),
        (start_payload(["true"], env=["PATH="]), COMMAND_NOT_FOUND, "'true'"),
        (start_payload([str(plain)]), NOT_EXECUTABLE, "Permission denied"),
        (start_payload(["plain"], env=[f"PATH={tmp_path}"]), NOT_EXECUTABLE, "'plain'"),
        (start_payload(["/tmp"]), NOT_EXECUTABLE, "'/tmp'"),
        (start_payload([str(broken)]), NOT_EXECUTABLE, "exec format error"),
        (start_payload([str(orphaned)]), NOT_EXECUTABLE, "interpreter"),
        (start_payload(["true"], cwd="/x"), BAD_CWD, "working directory '/x': No such file or directory"),
        (start_payload(["true"], cwd="/etc/passwd"), BAD_CWD, "Not a directory"),
        (start_payload(["true"], user="who"), BAD_USER, "user 'who'"),
        (start_payload(["true"], user="root:who"), BAD_USER, "no such group"),
        (start_payload(["true"], user="a:b:c"), BAD_USER, "user[:group]"),
        (start_payload(["true"], limits=[(99, 1, 1)]), START_FAILED, "resource limit 99"),
        (start_payload([]), INVALID, "no command"),
        (start_payload(["a\0b"]), INVALID, "NUL"),
        (start_payload(["true"], env=["NOVALUE"]), INVALID, "NAME=value"),
        (start_payload(["true"], tty=(0, 80)), INVALID, "size of zero"),
        (start_payload(["true"], flags=64), INVALID, "flag"),
        (start_payload(["true"]) + struct.pack("<HHI", 12, 0, 0), INVALID, "unknown attribute"),
        (start_payload(["true"])[:-1], INVALID, "cut short"),
    ]
    for number, (payload, code, text) in enumerate(cases):
        reply = client.start(f"s{number}", payload)
        assert reply.type == FAILED, (number, reply)
        assert reply.failure[0] == code and text in reply.failure[1], (number, reply.failure)
    assert records(client) == {}, "a failed start left an execution"
    assert client.start("", start_payload(["true"])).failure[0] == INVALID
    assert struct.unpack("<6Q", client.request(STATS).payload)[1] == 0


def test_a_failed_start_frees_its_id(client: Client) -> None:
    assert client.start("a", start_payload(["nope"])).type == FAILED
    assert client.run("a", start_payload(["true"])).status == 0


def test_control_characters_do_not_pass_into_messages(client: Client) -> None:
    assert client.start("a", start_payload(["a\n\x1b[31m"])).failure[1] == "command not found: 'a??[31m'"


def test_path_search(client: Client, tmp_path: Path) -> None:
    for name, mode in (("one", 0o644), ("two", 0o755)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "tool"
        file.write_text(f"#!/bin/sh\necho {name}\n")
        file.chmod(mode)
    env = [f"PATH=/nowhere:{tmp_path}/one:{tmp_path}/two"]
    assert client.run("a", start_payload(["tool"], env=env)).stdout == b"two\n"
    assert client.run("b", start_payload(["./tool"], env=env, cwd=f"{tmp_path}/two")).stdout == b"two\n"
    assert client.run("c", start_payload(["tool"], env=["PATH="], cwd=f"{tmp_path}/two")).stdout == b"two\n"
    assert client.run("d", start_payload(["true"], env=[])).status == 0, "no PATH: the usual directories"


def test_an_id_is_never_run_twice(client: Client, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    client.run("a", shell(f"echo x >>{mark}"))
    assert client.start("a", shell(f"echo x >>{mark}")).failure[0] == EXISTS
    assert client.request(FORGET, id="a").type == OK
    assert client.start("a", shell(f"echo x >>{mark}")).failure[0] == EXISTS, "it existed: it stays used"
    assert mark.read_text() == "x\n"


def test_environment_is_exactly_what_was_given(client: Client) -> None:
    seen = client.run("a", start_payload(["/usr/bin/env"], env=["A=1", "B==x", "HOME=/h"]))
    assert seen.stdout == b"A=1\nB==x\nHOME=/h\n"
    seen = client.run("b", start_payload(["/usr/bin/env"], env=[]))
    assert seen.stdout == f"HOME={pwd.getpwuid(0).pw_dir}\n".encode()


def test_a_command_starts_clean(client: Client) -> None:
    """Own session and group, default signals, empty mask, descriptors 0 to 2 only, umask 022, nothing inherited."""
    script = """
import os
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
fds = sorted(int(f) for f in os.listdir("/proc/self/fd"))
print(os.getpid() == os.getpgrp() == os.getsid(0), status["SigBlk"].strip(), status["Umask"].strip(), fds[:3], len(fds))
print(open("/proc/self/oom_score_adj").read().strip(), os.readlink("/proc/self/fd/0"), os.getcwd())
"""
    seen = client.run("a", start_payload(["python3", "-c", script]))
    assert seen.stdout == b"True 0000000000000000 0022 [0, 1, 2] 4\n500 /dev/null /\n", seen.stderr
    seen = client.run("b", start_payload(["grep", "SigIgn", "/proc/self/status"]))
    assert seen.stdout.split() == [b"SigIgn:", b"0" * 16]


def test_rlimits(client: Client) -> None:
    limits = [(resource.RLIMIT_NOFILE, 33, 44), (resource.RLIMIT_CPU, 100, 200)]
    seen = client.run("a", shell("ulimit -Sn; ulimit -Hn; ulimit -St", limits=limits))
    assert seen.stdout == b"33\n44\n100\n"


@pytest.mark.root
def test_users(client: Client) -> None:
    show = "id -u; id -g; id -G; echo $HOME"
    assert client.run("a", shell(show, user="nobody")).stdout == b"65534\n65534\n65534\n/nonexistent\n"
    assert client.run("b", shell(show, user="12345")).stdout == b"12345\n0\n0\n/\n"
    assert client.run("c", shell(show, user="12345:777")).stdout == b"12345\n777\n777\n/\n"
    assert client.run("d", shell(show, user="daemon:adm")).stdout.split()[:3] == [b"1", b"4", b"4"]
    assert client.run("e", shell(show, user="")).stdout.split()[:2] == [b"0", b"0"]
    seen = client.run("f", shell("grep CapEff /proc/self/status", user="nobody"))
    assert seen.stdout.split() == [b"CapEff:", b"0" * 16]


@pytest.mark.root
def test_an_ordinary_user_may_reopen_its_streams(client: Client) -> None:
    script = "echo a > /dev/stdout; echo b > /dev/stderr; head -c1 /dev/stdin > /dev/null && echo c"
    client.start("a", shell(script, user="nobody", flags=5))
    client.send(STDIN, b"x", id="a")
    seen = client.watch("a")
    assert (seen.stdout, seen.stderr) == (b"a\nc\n", b"b\n")
    seen = client.run("b", shell("echo t > $(tty)", user="nobody", tty=(24, 80)))
    assert seen.stdout == b"t\r\n"


@pytest.mark.root
def test_cwd_is_entered_as_the_user(client: Client, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    reply = client.start("a", start_payload(["true"], cwd=str(secret), user="nobody"))
    assert reply.failure[0] == BAD_CWD and "Permission denied" in reply.failure[1]


# --- stdin --------------------------------------------------------------------------------------


def test_stdin_of_any_size_with_credit(client: Client) -> None:
    """1 MiB through `cat` by a sender that keeps to its credit; the bytes come back in order."""
    data = random.Random(3).randbytes(1 << 20)
    client.start("a", start_payload(["cat"], flags=WATCH | WITH_STDIN))
    seen = Watched(credit=65536)
    sent = 0
    while sent < len(data):
        client.watch("a", seen, until=lambda s: s.credit > 0)
        piece = data[sent : sent + min(seen.credit, 20_000)]
        client.send(STDIN, piece, id="a")
        seen.credit -= len(piece)
        sent += len(piece)
    client.send(STDIN_EOF, id="a")
    client.send(STDIN_EOF, id="a")
    client.watch("a", seen)
    assert seen.stdout == data and seen.status == 0


def test_a_sender_that_exceeds_its_credit_is_disconnected(agent: Agent, client: Client) -> None:
    with agent.client() as greedy:
        greedy.start("a", shell("sleep 20", flags=WATCH | WITH_STDIN))
        greedy.send(STDIN, b"x" * 65536, id="a")
        assert greedy.request(PING).type == PONG
        greedy.send(STDIN, b"x" * 65537, id="a")
        with pytest.raises((EOFError, ConnectionResetError)):
            greedy.next()
    assert client.attach("a").type == ATTACHED


def test_stdin_sent_before_a_lost_connection_is_not_lost(agent: Agent) -> None:
    """More than a pipe takes, so that a part waits in the agent; the next connection gets the rest of the credit."""
    with agent.client() as first:
        first.start("a", shell("sleep 0.3; cat", flags=WATCH | WITH_STDIN))
        first.send(STDIN, b"1" * 60_000, id="a")
        first.send(STDIN, b"2" * 5_000, id="a")
        assert first.request(PING).type == PONG
    with agent.client() as second:
        attached = second.attach("a")
        assert 0 < attached.u32() <= 65536
        second.send(STDIN, b"3" * 10, id="a")
        second.send(STDIN_EOF, id="a")
        assert second.watch("a").stdout == b"1" * 60_000 + b"2" * 5_000 + b"3" * 10


def test_without_stdin_it_is_empty(client: Client) -> None:
    assert client.run("a", shell("wc -c")).stdout == b"0\n"


def test_a_command_that_ignores_its_stdin_keeps_its_exit_code(client: Client) -> None:
    client.start("a", shell("exec 0<&-; echo closed; sleep 0.2; exit 6", flags=WATCH | WITH_STDIN))
    seen = client.watch("a", until=lambda s: s.stdin_closed)
    client.send(STDIN, b"x" * 60_000, id="a")
    client.send(STDIN, b"x" * 60_000, id="a")
    client.watch("a", seen)
    assert (seen.stdout, seen.status) == (b"closed\n", 6)


def test_stdin_may_be_sent_before_started_arrives(client: Client) -> None:
    client.send(START, start_payload(["cat"], flags=WATCH | WITH_STDIN), req=500, id="a")
    client.send(STDIN, b"early", id="a")
    client.send(STDIN_EOF, id="a")
    assert client.reply(500).type == STARTED
    assert client.watch("a").stdout == b"early"


# --- terminal -----------------------------------------------------------------------------------


def test_terminal_size_and_resize(client: Client) -> None:
    script = "stty size; trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.05; done"
    client.start("a", shell(script, tty=(33, 77)))
    seen = client.watch("a", until=lambda s: b"ready" in s.stdout)
    assert client.resize("a", 50, 132).type == OK
    assert client.resize("a", 0, 10).failure[0] == INVALID
    client.watch("a", seen)
    assert seen.stdout == b"33 77\r\nready\r\n50 132\r\n"
    assert seen.status == 4
    assert seen.eof[2] == (0, 0), "one merged stream; the other is empty"
    assert client.resize("a", 5, 5).failure[0] == FINISHED


def test_resize_without_a_terminal(client: Client) -> None:
    client.start("a", shell("read x", flags=5))
    assert client.resize("a", 5, 5).failure[0] == INVALID
    assert client.resize("nope", 5, 5).failure[0] == NOT_FOUND


def test_terminal_is_the_controlling_one_and_merges_streams(client: Client) -> None:
    seen = client.run("a", shell("test -t 0 && test -t 1 && test -t 2; echo $? >/dev/tty; echo e >&2", tty=(24, 80)))
    assert seen.stdout == b"0\r\ne\r\n"


def test_terminal_end_of_input(client: Client) -> None:
    """VEOF; behind an unfinished line it takes two, and the reader still gets that line."""
    for number, text in enumerate((b"line\n", b"partial", b"")):
        client.start(f"t{number}", shell("stty -echo; echo go; cat; echo end", tty=(24, 80), flags=5))
        seen = client.watch(f"t{number}", until=lambda s: b"go" in s.stdout)
        if text:
            client.send(STDIN, text, id=f"t{number}")
        client.send(STDIN_EOF, id=f"t{number}")
        client.send(STDIN_EOF, id=f"t{number}")
        client.watch(f"t{number}", seen)
        assert seen.stdout == b"go\r\n" + text.replace(b"\n", b"\r\n") + b"end\r\n"


def test_terminal_interrupt_character(client: Client) -> None:
    client.start("a", shell("echo go; sleep 20", tty=(24, 80), flags=5))
    seen = client.watch("a", until=lambda s: b"go" in s.stdout)
    client.send(STDIN, b"\x03", id="a")
    client.watch("a", seen)
    assert seen.status == -signal.SIGINT


def test_terminal_output_is_whole_at_exit(client: Client) -> None:
    want = b"".join(b"%d\r\n" % i for i in range(1, 20001))
    for number in range(5):
        assert client.run(f"t{number}", start_payload(["seq", "20000"], tty=(24, 80))).stdout == want


def test_a_terminal_that_was_let_go_for_a_while_is_not_closed(client: Client) -> None:
    script = "exec 3>&1; exec 0<&- 1>&- 2>&- 3>&-; sleep 0.3; echo again >/dev/tty; exit 8"
    seen = client.run("a", shell(script, tty=(24, 80)))
    assert (seen.stdout, seen.status) == (b"again\r\n", 8)


# --- signals and timeouts -----------------------------------------------------------------------


def test_signal_goes_to_the_group(client: Client) -> None:
    client.start("a", shell("trap 'echo got; exit 3' USR1; sleep 20 & echo $!; wait"))
    seen = client.watch("a", until=lambda s: b"\n" in s.stdout)
    assert client.signal("a", signal.SIGUSR1).type == OK
    client.watch("a", seen)
    assert seen.status == 3 and seen.stdout.endswith(b"got\n")
    assert seen.eof[1][1] == 0, "the sleeper of the same group died as well"
    assert client.signal("a", 9).failure[0] == FINISHED
    assert client.signal("nope", 9).failure[0] == NOT_FOUND


def test_signal_numbers_are_checked(client: Client) -> None:
    client.start("a", shell("read x", flags=5))
    for number in (0, 65, 2**31, 2**32 - 9):
        assert client.signal("a", number).failure[0] == INVALID


def test_timeout_terminates_and_keeps_the_output(client: Client) -> None:
    seen = client.run("a", shell("echo before; sleep 20", timeout_ms=200))
    assert (seen.stdout, seen.status, seen.timed_out) == (b"before\n", -signal.SIGTERM, True)
    assert records(client)["a"][1] & 8


def test_timeout_kills_what_ignores_it(client: Client) -> None:
    begin = time.monotonic()
    seen = client.run("a", shell("trap '' TERM; echo on; while :; do sleep 0.05; done", timeout_ms=100, kill_after_ms=200))
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
            assert client.request(FORGET, id=name).type == OK
        wait_for(lambda pid=pid: gone(pid), 3)  # type: ignore[misc]


def test_a_command_that_ends_in_time_is_not_marked(client: Client) -> None:
    seen = client.run("a", shell("echo x", timeout_ms=60_000))
    assert seen.status == 0 and not seen.timed_out


def test_timeouts_hold_without_a_host(agent: Agent) -> None:
    with agent.client() as first:
        first.start("a", shell("sleep 20", timeout_ms=200))
    with agent.client() as second:
        assert second.attach("a").type == ATTACHED
        assert second.watch("a").timed_out


# --- table --------------------------------------------------------------------------------------


def test_list_and_stats(client: Client) -> None:
    client.run("done", shell("exit 5"))
    client.start("live", shell("read x", flags=5))
    rows = records(client)
    assert set(rows) == {"done", "live"}
    state, flags, _pid, status, begin, end = rows["done"]
    assert (state, flags, status) == (1, 0, 5) and 0 < begin <= end
    state, flags, pid, _status, begin, end = rows["live"]
    assert (state, flags, end) == (0, 2, 0) and not gone(pid)
    reply = client.request(STATS)
    assert reply.type == STATS_OK
    processes, started, failed, output, _input, uptime = struct.unpack("<6Q", reply.payload)
    assert processes > 1 and (started, failed, output) == (2, 0, 0) and uptime < 60_000


def test_unknown_and_forgotten_executions(client: Client) -> None:
    assert client.attach("nope").failure[0] == NOT_FOUND
    assert client.request(FORGET, id="nope").failure[0] == NOT_FOUND
    client.start("a", shell("read x", flags=5))
    assert client.request(FORGET, id="a").failure[0] == BUSY
    client.send(STDIN_EOF, id="a")
    client.watch("a")
    assert client.request(FORGET, id="a").type == OK
    assert client.attach("a").failure[0] == REAPED
    assert client.request(FORGET, id="a").failure[0] == REAPED
    assert client.signal("a", 9).failure[0] == FINISHED
    assert records(client) == {}


def test_forget_tells_a_watcher_that_lacks_bytes(agent: Agent, client: Client) -> None:
    with agent.client() as slow:
        slow.start("a", shell("seq 1000000"))
        taken = slow.watch("a", until=lambda s: len(s.stdout) == WINDOW, ack=False)
        client.attach("a", 0)
        client.signal("a", 9)
        assert client.next().type == EXITED
        assert client.request(FORGET, id="a").type == OK
        slow.watch("a", taken, ack=False)
        assert taken.status == -9
        assert taken.eof[1] == (taken.position[1], 1)


def test_finished_executions_are_kept_up_to_a_number(client: Client) -> None:
    for number in range(1030):
        client.run(f"e{number}", start_payload(["/bin/true"]))
    rows = records(client)
    assert len(rows) == 1024
    assert "e5" not in rows and "e6" in rows
    assert client.attach("e5").failure[0] == REAPED


def test_finished_executions_are_kept_up_to_a_size(client: Client) -> None:
    for number in range(40):
        client.run(f"e{number}", shell("head -c 500000 /dev/zero"))
    rows = records(client)
    assert "e0" not in rows and "e39" in rows
    assert len(rows) == (16 << 20) // WINDOW


def resident(pid: int) -> int:
    """Private and shared memory of a process in bytes."""
    with open(f"/proc/{pid}/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096


def test_finished_executions_are_small(agent: Agent, client: Client) -> None:
    before = resident(agent.process.pid)
    for number in range(500):
        client.run(f"e{number}", start_payload(["/bin/echo", "x"]))
    assert (resident(agent.process.pid) - before) / 500 < 2500


def test_descriptors_do_not_leak(agent: Agent, client: Client) -> None:
    def count() -> int:
        return len(os.listdir(f"/proc/{agent.process.pid}/fd"))  # noqa: PTH208

    client.run("warm", shell("true", flags=5))
    before = count()
    for number in range(50):
        client.run(f"a{number}", shell("echo x"))
        client.start(f"b{number}", start_payload(["nope"]))
        client.run(f"c{number}", shell("echo x", tty=(24, 80), flags=5))
        client.run(f"d{number}", shell("exec 0<&-", flags=5))
    assert count() == before


# --- main command and power-off -----------------------------------------------------------------


def test_main_command_ends_the_box_and_leaves_a_record(agent: Agent, client: Client) -> None:
    client.start("main", shell("echo out; echo err >&2; read x; exit 3", flags=7))
    seen = client.watch("main", until=lambda s: bool(s.stdout and s.stderr))
    assert client.start("two", shell("true", flags=MAIN)).failure[0] == EXISTS
    client.start("side", shell("sleep 20"))
    client.send(STDIN_EOF, id="main")
    client.watch("main", seen)
    assert seen.status == 3
    assert agent.process.wait(5) == 0
    assert re.fullmatch(r"exit 3 0 \d{19}\n", (agent.directory / "exit").read_text())
    assert sorted(agent.log()) == [(0, b"err\n", 2), (0, b"out\n", 1)]


def test_main_without_a_watcher_is_logged(agent: Agent, client: Client) -> None:
    client.start("main", shell("seq 100000; exit 0", flags=MAIN))
    assert agent.process.wait(10) == 0
    joined, position = b"", 0
    for at, data, stream in agent.log():
        assert (at, stream) == (position, 1)
        joined += data
        position += len(data)
    assert joined == b"".join(b"%d\n" % i for i in range(1, 100001))


def test_main_log_rotates(agent: Agent, client: Client) -> None:
    client.start("main", shell("head -c 30000000 /dev/zero", flags=MAIN | WATCH))
    client.watch("main")
    assert agent.process.wait(5) == 0
    sizes = [(agent.directory / f"main.log.{i}").stat().st_size for i in (0, 1)]
    assert all(0 < size <= (8 << 20) + WINDOW for size in sizes), sizes
    position, data, _ = agent.log()[-1]
    assert position + len(data) == 30_000_000


def test_main_that_cannot_start_leaves_the_box_alive(agent: Agent, client: Client) -> None:
    assert client.start("main", start_payload(["nope"], flags=MAIN)).failure[0] == COMMAND_NOT_FOUND
    assert client.run("a", shell("echo x")).stdout == b"x\n"


def test_power_off_gives_grace_and_tells_the_watchers(agent: Agent, client: Client) -> None:
    script = "trap 'echo bye; exit 5' TERM; echo go; while :; do sleep 0.05; done"
    client.start("a", shell(script))
    seen = client.watch("a", until=lambda s: b"go" in s.stdout)
    begin = time.monotonic()
    assert client.poweroff(5000).type == OK
    assert client.start("late", shell("true")).failure[0] == BUSY
    client.watch("a", seen)
    assert (seen.stdout, seen.status) == (b"go\nbye\n", 5)
    assert agent.process.wait(5) == 0
    assert time.monotonic() - begin < 3, "the grace time is a limit, not a delay"


def test_power_off_kills_at_the_end_of_the_grace_time(agent: Agent, client: Client) -> None:
    client.start("a", shell("trap '' TERM; echo go; while :; do sleep 0.05; done"))
    seen = client.watch("a", until=lambda s: b"go" in s.stdout)
    begin = time.monotonic()
    client.poweroff(300)
    client.watch("a", seen)
    assert seen.status == -9
    assert agent.process.wait(5) == 0
    assert 0.3 <= time.monotonic() - begin < 3


def test_power_off_sends_the_stop_signal_to_main(agent: Agent, client: Client) -> None:
    script = "trap 'exit 5' TERM; trap 'exit 6' INT; echo go; while :; do sleep 0.05; done"
    client.start("main", shell(script, flags=MAIN | WATCH))
    client.start("side", shell(script))
    main = client.watch("main", until=lambda s: b"go" in s.stdout)
    side = client.watch("side", until=lambda s: b"go" in s.stdout)
    client.poweroff(5000, signal.SIGINT)
    client.watch("main", main)
    client.watch("side", side)
    assert (main.status, side.status) == (6, 5)
    assert agent.process.wait(5) == 0
    assert (agent.directory / "exit").read_text().startswith("exit 6 0 ")


def test_power_off_at_once(agent: Agent, client: Client) -> None:
    client.start("a", shell("trap '' TERM; head -c 3000000 /dev/zero; sleep 20", flags=0))
    begin = time.monotonic()
    client.poweroff()
    assert agent.process.wait(5) == 0
    assert time.monotonic() - begin < 1


def test_an_earlier_exit_record_is_cleared() -> None:
    with running_agent() as agent, agent.client() as client:
        exit_file = agent.directory / "exit"
        client.start("main", shell("exit 1", flags=MAIN))
        agent.process.wait(5)
        assert exit_file.read_text().startswith("exit 1")


def test_exit_and_end_frames_have_the_documented_shape(client: Client) -> None:
    client.start("a", shell("echo x"))
    frames = [client.next() for _ in range(4)]
    assert sorted(f.type for f in frames) == [DATA, EOF, EOF, EXITED]
    for frame in frames:
        assert len(frame.payload) == {DATA: 10, EOF: 9, EXITED: 40}[frame.type]
