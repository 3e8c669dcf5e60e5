"""The agent as PID 1 of a namespace, as it is in a box."""

from __future__ import annotations

import signal
import struct
import time
from typing import TYPE_CHECKING

import pytest

from .client import MAIN, WATCH, Client, Kind, shell, start_payload
from .support import Agent, running_agent, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root


@pytest.fixture
def agent() -> Iterator[Agent]:
    namespaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    # Less than the powers over processes of other users that root has outside of a user namespace.
    fewer = "-sys_ptrace,-sys_admin,-perfmon,-dac_override,-dac_read_search"
    with running_agent(hold_ms=400, prefix=[*namespaces, "setpriv", "--bounding-set", fewer]) as running:
        yield running


def processes(client: Client) -> int:
    return int(struct.unpack_from("<Q", client.request(Kind.STATS).payload)[0])


def test_orphans_are_reaped(client: Client) -> None:
    alone = processes(client)
    assert alone == 1
    client.run("a", shell("for i in 1 2 3 4 5; do (setsid sleep 0.2 >/dev/null 2>&1 &); done"))
    assert processes(client) > alone
    wait_for(lambda: processes(client) == alone)


def test_signals_from_inside_do_nothing(client: Client) -> None:
    script = "for s in TERM INT HUP USR1 KILL STOP CHLD SEGV PIPE; do kill -$s 1; done; echo done"
    assert client.run("a", shell(script)).stdout == b"done\n"
    assert client.request(Kind.PING).type == Kind.PONG


def test_the_agent_is_closed_to_its_own_user(client: Client) -> None:
    """Not dumpable: a process with the same user and capabilities reads another one like itself, but not the agent."""
    other = client.start("other", start_payload(["sleep", "30"])).u32()
    look = "cat /proc/$pid/environ | wc -c; readlink /proc/$pid/fd/0; head -c0 /proc/$pid/mem && echo mem"
    seen = client.run("a", shell(f"for pid in {other} 1; do {look}; done"))
    assert seen.stdout.split() == [b"30", b"/dev/null", b"mem", b"0"]
    assert seen.stderr.count(b"Permission denied") == 2


def test_power_off_reaches_every_process(agent: Agent, client: Client) -> None:
    """Daemons in sessions of their own get SIGTERM too."""
    daemon = "trap 'echo daemon >&3; exit' TERM; echo up >&3; while :; do sleep 0.02; done"
    script = 'setsid sh -c "$DAEMON" 3>&1 >/dev/null 2>&1 & exec sleep 30'
    client.start("a", shell(script, env=["PATH=/usr/bin:/bin", f"DAEMON={daemon}"], linger_ms=2000))
    seen = client.watch("a", until=lambda s: s.stdout == b"up\n")
    client.poweroff(5000)
    client.watch("a", seen)
    assert seen.stdout == b"up\ndaemon\n"
    assert seen.status == -signal.SIGTERM
    assert agent.process.wait(5) == 0


def test_a_special_stop_signal_spares_main_the_usual_one(agent: Agent, client: Client) -> None:
    script = "trap 'exit 5' TERM; trap 'exit 6' INT; echo go; while :; do sleep 0.05; done"
    client.start("main", shell(script, flags=MAIN | WATCH))
    client.start("side", shell(script))
    main = client.watch("main", until=lambda s: b"go" in s.stdout)
    side = client.watch("side", until=lambda s: b"go" in s.stdout)
    client.poweroff(5000, signal.SIGINT)
    client.watch("side", side)
    client.watch("main", main)
    assert (main.status, side.status) == (6, 5)
    assert agent.process.wait(5) == 0


def test_the_end_of_main_ends_everything_at_once(agent: Agent, client: Client) -> None:
    client.start("main", shell("setsid sleep 30 >/dev/null 2>&1 & trap '' TERM; exit 3", flags=MAIN | WATCH))
    begin = time.monotonic()
    assert client.watch("main").status == 3
    assert agent.process.wait(5) == 0
    assert time.monotonic() - begin < 1.5
