"""Every policy, against every way to reach somebody, in every kind of box.

What is refused is proved twice: who asked was not answered, and nobody saw it. What is admitted, likewise. So each
probe is the control of the same one under the next policy.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from tests.net import matrix
from tests.net.conftest import IMAGE
from tests.net.matrix import OUTSIDE, PLACES, PORT, Probe, Results
from tests.net.packets import ICMP, tapped
from tests.net.world import GOOD, GOOD6, HOST, METADATA, NAMES, OTHER, PRIVATE, serve
from tests.ordinary_user import NAME

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator
    from pathlib import Path

    from hutch.runtime.runtime import LocalRuntime
    from tests.net.packets import Packet, Tap
    from tests.net.world import World
    from tests.ordinary_user import OrdinaryUser

pytestmark = pytest.mark.anyio

POLICIES = {
    "never": ("disabled", []),
    "enabled": ("enabled", []),
    "network": ("allow-list", ["198.51.100.8/29", f"{GOOD6}/124"]),
    "ip:port": ("allow-list", [f"{GOOD}:{PORT}", f"{GOOD}:{matrix.UDP_PORT}"]),
    "name": ("allow-list", ["good.test", "named.test"]),
    "wildcard": ("allow-list", ["*.good.test", "*.named.test"]),
    "other-port": ("allow-list", [f"{GOOD}:20-79", "good.test:81-442", "*.good.test:444"]),
    "special": ("allow-list", [METADATA, HOST, "host.hutch.internal"]),
    "no-more": ("disabled", []),
}
"""In this order, of one box that is made with the first one."""

TABLE = """
                     never enabled network ip:port name wildcard other-port special no-more
tcp:good               .      +       +       +     .      .         .         .       .
tcp:other              .      +       .       .     .      .         .         .       .
tcp:private            .      +       .       .     .      .         .         .       .
tcp:metadata           .      .       .       .     .      .         .         +       .
tcp:ipv6               .      +       +       .     .      .         .         .       .
tcp:host               .      .       .       .     .      .         .         +       .
tcp:host-loopback      .      .       .       .     .      .         .         +       .
tls:good.test          .      +       +       .     +      .         .         .       .
tls:sub.good.test      .      +       +       .     .      +         .         .       .
tls:other.test         .      +       .       .     .      .         .         .       .
http:good.test         .      +       +       .     +      .         .         .       .
http:sub.good.test     .      +       +       .     .      +         .         .       .
http:other.test        .      +       .       .     .      .         .         .       .
udp:good               .      +       +       +     .      .         .         .       .
udp:other              .      +       .       .     .      .         .         .       .
udp:private            .      +       .       .     .      .         .         .       .
udp:metadata           .      .       .       .     .      .         .         +       .
udp:ipv6               .      +       +       .     .      .         .         .       .
dns:named.test         .      +       +       +     +      .         +         +       .
dns:sub.named.test     .      +       +       +     .      +         +         +       .
dns:stranger.test      .      +       +       +     .      .         +         +       .
raw:good               .      +       +       +     .      .         .         .       .
raw:other              .      +       .       .     .      .         .         .       .
packet:good            .      v       v       v     .      .         .         .       .
packet:other           .      v       .       .     .      .         .         .       .
icmp:good              .      .       .       .     .      .         .         .       .
icmp:other             .      .       .       .     .      .         .         .       .
unix:abstract          .      .       .       .     .      .         .         .       .
"""
"""What is admitted: ``+`` in all kinds of boxes, ``v`` in VMs alone, whose card is theirs."""


def _admitted(policy: str, marks: str) -> set[str]:
    head, *rows = TABLE.strip("\n").splitlines()
    column = head.split().index(policy)
    return {name for name, *cells in map(str.split, rows) if cells[column] in marks}


def test_the_table_is_complete() -> None:
    """A row for each probe, a column for each policy; and what no policy admits is known."""
    head, *rows = TABLE.strip("\n").splitlines()
    assert head.split() == [*POLICIES]
    assert all(len(row.split()) == len(POLICIES) + 1 for row in rows)
    names = [row.split()[0] for row in rows]
    assert sorted(names) == sorted(probe.name for probe in matrix.probes(OUTSIDE, 1, "x"))
    ever = set().union(*(_admitted(policy, "+v") for policy in POLICIES))
    assert {*names} - ever == {"icmp:good", "icmp:other", "unix:abstract"}


class Witness:
    """What was seen outside."""

    def __init__(self, world: World, tap: Tap, listeners: list[socket.socket]) -> None:
        self._world = world
        self._tap = tap
        self._listeners = listeners
        self._said: set[str] = set()

    def note(self, connection: socket.socket) -> None:
        """Say again what is said."""
        while data := connection.recv(4096):
            self._said.add(data.decode())
            connection.sendall(data)

    @property
    def host_port(self) -> int:
        """A port at all addresses of the host."""
        return int(self._listeners[0].getsockname()[1])

    @property
    def abstract(self) -> str:
        """The name of a socket of the host."""
        name: bytes = self._listeners[1].getsockname()
        return name[1:].decode()

    def seen(self) -> tuple[set[str], list[Packet]]:
        """Return the probes that reached somebody since the last time, and the packets that began something."""
        packets = [packet for packet in self._tap.packets() if not packet.goes_on]
        found = self._said | {data.decode() for data in self._world.datagrams}
        found |= {f"tls:{name}" for name in self._world.names} | {f"dns:{name}" for name, _ in self._world.queries}
        found |= {f"http:{request.split()[1][1:]}" for request in self._world.requests}
        pinged = {packet.target for packet in packets if packet.protocol == ICMP}
        found |= {f"icmp:{name}" for name, address in (("good", GOOD), ("other", OTHER)) if address in pinged}
        self._world.reset()
        self._said.clear()
        # The names of connections are looked up as well.
        return found - {f"dns:{name}" for name in ("good.test", "sub.good.test", "other.test")}, packets


@contextlib.contextmanager
def _witness(world: World) -> Iterator[Witness]:
    with contextlib.ExitStack() as stack:
        tap = stack.enter_context(tapped(world))
        everywhere = stack.enter_context(socket.create_server(("", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind("")  # the kernel finds a name
        abstract.listen()
        witness = Witness(world, tap, [everywhere, abstract])
        started = [world.serve(each, PORT, witness.note) for each in (GOOD, OTHER, PRIVATE, METADATA, GOOD6)]
        for listener in (everywhere, abstract):
            serve(listener, witness.note)
        try:
            yield witness
        finally:
            for listener in (*started, everywhere, abstract):
                listener.shutdown(socket.SHUT_RDWR)
                listener.close()


async def _check(
    isolation: str, witness: Witness, ask: Callable[[str, list[str], list[Probe], Collection[str]], Awaitable[set[str]]]
) -> None:
    """Run the probes under all policies, and demand what the table says."""
    asked = matrix.probes(PLACES[isolation], witness.host_port, witness.abstract)
    targets = {probe.name: probe.target for probe in asked}
    for policy, (outbound, allow) in POLICIES.items():
        witness.seen()
        expected = _admitted(policy, "+v" if isolation == "vm" else "+")
        admitted = await ask(outbound, allow, asked, expected)
        seen, packets = witness.seen()
        assert (policy, sorted(admitted)) == (policy, sorted(expected))
        assert (policy, sorted(seen)) == (policy, sorted(expected))
        allowed = {targets[name] for name in expected} | ({NAMES} if outbound != "disabled" else set())
        assert {packet.target for packet in packets} <= allowed, policy


async def test_nothing_but_the_policy_is_in_the_way(world: World, probes: Path) -> None:
    """The control of all: from outside of a box each probe reaches whom it is for, and is seen."""
    with _witness(world) as witness:
        asked = matrix.probes(OUTSIDE, witness.host_port, witness.abstract)
        results = Results(asked)
        everything = {probe.name for probe in asked}
        async with await anyio.open_process([probes]) as process:
            assert process.stdin is not None and process.stdout is not None
            await process.stdin.send(matrix.script(asked))
            await process.stdin.aclose()
            with anyio.fail_after(20):
                async for line in matrix.lines(process.stdout):
                    results.take(line)
                    if results.are_complete(everything):
                        break
        assert results.admitted == everything
        assert witness.seen()[0] == everything  # whoever answers has noted it before


@pytest.mark.parametrize("isolation", ["container", "vm"])
async def test_policies_and_protocols(runtime: LocalRuntime, world: World, isolation: str) -> None:
    box = await runtime.create(IMAGE, network="disabled")
    await box.start()

    async def ask(outbound: str, allow: list[str], asked: list[Probe], awaited: Collection[str]) -> set[str]:
        await box.network.update(outbound, allow=allow)
        return await matrix.ask(box, asked, awaited)

    with _witness(world) as witness:
        await _check(isolation, witness, ask)


SERVE = """
import pathlib, sys, anyio
from tests.net.matrix import serve
anyio.run(serve, pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3])
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("isolation", ["container", "vm"])
async def test_policies_and_protocols_of_an_ordinary_user(
    ordinary_user: OrdinaryUser, world: World, probes: Path, vm_store: Path, isolation: str
) -> None:
    place = ordinary_user.folder("matrix")
    subprocess.run(["install", "-m", "755", probes, place / "probes"], check=True)
    if isolation == "vm":
        shutil.copytree(vm_store / "kernels", place / "home/vm/kernels", ignore=shutil.ignore_patterns("lock"))
        subprocess.run(["chown", "-R", NAME, place / "home"], check=True)
    command = ordinary_user.command("-c", SERVE, str(place / "home"), str(place / "probes"), isolation)
    with (
        _witness(world) as witness,
        subprocess.Popen(
            command, cwd=ordinary_user.place, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as server,
    ):
        assert server.stdin is not None and server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        async def ask(outbound: str, allow: list[str], asked: list[Probe], awaited: Collection[str]) -> set[str]:
            line = json.dumps([outbound, allow, witness.host_port, witness.abstract, sorted(awaited)])
            print(line, file=stdin, flush=True)
            return set(json.loads(await anyio.to_thread.run_sync(stdout.readline)))

        await _check(isolation, witness, ask)
        stdin.close()
        assert server.wait(20) == 0
