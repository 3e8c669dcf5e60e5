"""Input with credit, and terminals."""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING

import pytest

from .client import WATCH, WITH_STDIN, Client, Fault, Kind, Watched, shell, start_payload

if TYPE_CHECKING:
    from .support import Agent


def test_stdin_of_any_size_with_credit(client: Client) -> None:
    """1 MiB through `cat` by a sender that keeps to its credit; the bytes come back in order."""
    data = random.Random(3).randbytes(1 << 20)
    client.start("a", start_payload(["cat"], flags=WATCH | WITH_STDIN))
    seen = Watched(credit=65536)
    sent = 0
    while sent < len(data):
        client.watch("a", seen, until=lambda s: s.credit > 0)
        piece = data[sent : sent + min(seen.credit, 20_000)]
        client.send(Kind.STDIN, piece, id="a")
        seen.credit -= len(piece)
        sent += len(piece)
    client.send(Kind.STDIN_EOF, id="a")
    client.send(Kind.STDIN_EOF, id="a")
    client.watch("a", seen)
    assert seen.stdout == data and seen.status == 0


def test_a_sender_that_exceeds_its_credit_is_disconnected(agent: Agent, client: Client) -> None:
    with agent.client() as greedy:
        greedy.start("a", shell("sleep 20", flags=WATCH | WITH_STDIN))
        greedy.send(Kind.STDIN, b"x" * 65536, id="a")
        assert greedy.request(Kind.PING).type == Kind.PONG
        greedy.send(Kind.STDIN, b"x" * 65537, id="a")
        with pytest.raises((EOFError, ConnectionResetError)):
            while greedy.next().type == Kind.STDIN_CREDIT:
                pass
    assert client.attach("a").type == Kind.ATTACHED


def test_stdin_sent_before_a_lost_connection_is_not_lost(agent: Agent) -> None:
    """More than a pipe takes, so that a part waits in the agent and counts against the next credit."""
    with agent.client() as first:
        first.start("a", shell("sleep 0.3; cat", flags=WATCH | WITH_STDIN))
        for _ in range(2):
            first.send(Kind.STDIN, b"1" * 60_000, id="a")
            assert first.request(Kind.PING).type == Kind.PONG
    with agent.client() as second:
        left = second.attach("a").u32()
        assert 10 < left <= 65536 - (120_000 - 65536), "what waits was not counted"
        second.send(Kind.STDIN, b"2" * 10, id="a")
        seen = second.watch("a", until=lambda s: len(s.stdout) == 120_010)
        assert 65536 - 16384 < left - 10 + seen.credit <= 65536, "the credit did not come back"
        second.send(Kind.STDIN_EOF, id="a")
        assert second.watch("a", seen).stdout == b"1" * 120_000 + b"2" * 10


def test_without_stdin_it_is_empty(client: Client) -> None:
    assert client.run("a", shell("wc -c")).stdout == b"0\n"


def test_a_command_that_ignores_its_stdin_keeps_its_exit_code(client: Client) -> None:
    client.start("a", shell("exec 0<&-; echo closed; sleep 0.2; exit 6", flags=WATCH | WITH_STDIN))
    seen = client.watch("a", until=lambda s: s.stdin_closed)
    client.send(Kind.STDIN, b"x" * 60_000, id="a")
    client.send(Kind.STDIN, b"x" * 60_000, id="a")
    client.watch("a", seen)
    assert (seen.stdout, seen.status) == (b"closed\n", 6)


def test_stdin_may_be_sent_before_started_arrives(client: Client) -> None:
    client.send(Kind.START, start_payload(["cat"], flags=WATCH | WITH_STDIN), req=500, id="a")
    client.send(Kind.STDIN, b"early", id="a")
    client.send(Kind.STDIN_EOF, id="a")
    assert client.reply(500).type == Kind.STARTED
    assert client.watch("a").stdout == b"early"


def test_terminal_size_and_resize(client: Client) -> None:
    script = "stty size; trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.05; done"
    client.start("a", shell(script, tty=(33, 77)))
    seen = client.watch("a", until=lambda s: b"ready" in s.stdout)
    assert client.resize("a", 50, 132).type == Kind.OK
    assert client.resize("a", 0, 10).failure[0] == Fault.INVALID
    client.watch("a", seen)
    assert seen.stdout == b"33 77\r\nready\r\n50 132\r\n"
    assert seen.status == 4
    assert seen.eof[2] == (0, 0), "one merged stream; the other is empty"
    assert client.resize("a", 5, 5).failure[0] == Fault.FINISHED


def test_resize_without_a_terminal(client: Client) -> None:
    client.start("a", shell("read x", flags=5))
    assert client.resize("a", 5, 5).failure[0] == Fault.INVALID
    assert client.resize("nope", 5, 5).failure[0] == Fault.NOT_FOUND


def test_terminal_is_the_controlling_one_and_merges_streams(client: Client) -> None:
    seen = client.run("a", shell("test -t 0 && test -t 1 && test -t 2; echo $? >/dev/tty; echo e >&2", tty=(24, 80)))
    assert seen.stdout == b"0\r\ne\r\n"


def test_terminal_end_of_input(client: Client) -> None:
    """VEOF; behind an unfinished line it takes two, and the reader still gets that line."""
    for number, text in enumerate((b"line\n", b"partial", b"")):
        client.start(f"t{number}", shell("stty -echo; echo go; cat; echo end", tty=(24, 80), flags=5))
        seen = client.watch(f"t{number}", until=lambda s: b"go" in s.stdout)
        if text:
            client.send(Kind.STDIN, text, id=f"t{number}")
        client.send(Kind.STDIN_EOF, id=f"t{number}")
        client.send(Kind.STDIN_EOF, id=f"t{number}")
        client.watch(f"t{number}", seen)
        assert seen.stdout == b"go\r\n" + text.replace(b"\n", b"\r\n") + b"end\r\n"


def test_terminal_interrupt_character(client: Client) -> None:
    client.start("a", start_payload(["sleep", "20"], tty=(24, 80), flags=5))
    client.send(Kind.STDIN, b"\x03", id="a")
    assert client.watch("a").status == -signal.SIGINT


def test_terminal_output_is_whole_at_exit(client: Client) -> None:
    want = b"".join(b"%d\r\n" % i for i in range(1, 20001))
    for number in range(5):
        assert client.run(f"t{number}", start_payload(["seq", "20000"], tty=(24, 80))).stdout == want


def test_a_terminal_that_was_let_go_for_a_while_is_not_closed(client: Client) -> None:
    script = "exec 3>&1; exec 0<&- 1>&- 2>&- 3>&-; sleep 0.3; echo again >/dev/tty; exit 8"
    seen = client.run("a", shell(script, tty=(24, 80)))
    assert (seen.stdout, seen.status) == (b"again\r\n", 8)
