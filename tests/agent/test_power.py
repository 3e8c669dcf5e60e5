"""The main command and power-off."""

from __future__ import annotations

import re
import signal
import time

from .client import MAIN, WATCH, WINDOW, Client, Fault, Kind, shell, start_payload
from .support import Agent, running_agent


def test_main_command_ends_the_box_and_leaves_a_record(agent: Agent, client: Client) -> None:
    client.start("main", shell("echo out; echo err >&2; read x; exit 3", flags=7))
    seen = client.watch("main", until=lambda s: bool(s.stdout and s.stderr))
    assert client.start("two", shell("true", flags=MAIN)).failure[0] == Fault.EXISTS
    client.start("side", shell("sleep 20"))
    client.send(Kind.STDIN_EOF, id="main")
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
    assert client.start("main", start_payload(["nope"], flags=MAIN)).failure[0] == Fault.COMMAND_NOT_FOUND
    assert client.run("a", shell("echo x")).stdout == b"x\n"


def test_power_off_gives_grace_and_tells_the_watchers(agent: Agent, client: Client) -> None:
    script = "trap 'sleep 0.3; echo bye; exit 5' TERM; echo go; while :; do sleep 0.05; done"
    client.start("a", shell(script))
    seen = client.watch("a", until=lambda s: b"go" in s.stdout)
    begin = time.monotonic()
    assert client.poweroff(5000).type == Kind.OK
    assert client.start("late", shell("true")).failure[0] == Fault.BUSY
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
    assert sorted(f.type for f in frames) == [Kind.DATA, Kind.EOF, Kind.EOF, Kind.EXITED]
    for frame in frames:
        assert len(frame.payload) == {Kind.DATA: 10, Kind.EOF: 9, Kind.EXITED: 40}[Kind(frame.type)]
