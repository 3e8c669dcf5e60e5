"""UDP: what each policy lets through, who may answer, and what a hostile box can do with it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from hutch.core.policy import GATEWAY_ADDRESS
from hutch.host import netns
from hutch.host.proc import poll_until
from hutch.net import flows
from hutch.net.meter import Meter
from tests.net.conftest import IMAGE, Caller, gateways
from tests.net.packets import tapped
from tests.net.world import GOOD, GOOD6, HOST, METADATA, OTHER, PRIVATE

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from tests.net.world import World

pytestmark = pytest.mark.anyio

_PORT = 9999


async def _box(runtime: LocalRuntime, *rules: str, outbound: str = "") -> LocalBox:
    box = await runtime.create(IMAGE, network=outbound or list(rules))
    await box.start()
    return box


async def _ask(box: LocalBox, address: str, port: int = _PORT, text: bytes = b"hello") -> bytes:
    """Send a datagram from the box, and return the answer; empty when it was refused."""
    return (await box.run("talk", "udp", address, str(port), "10", input=text)).stdout


async def _chat(box: LocalBox, address: str, port: int) -> Caller:
    return Caller(await box.exec("talk", "chat", address, str(port), stdin=True))


def _echo(server: socket.socket) -> None:
    def work() -> None:
        with contextlib.suppress(OSError):
            while True:
                data, sender = server.recvfrom(65536)
                if not sender:
                    return
                server.sendto(data, sender)

    threading.Thread(target=work, daemon=True).start()


@pytest.mark.parametrize(
    ("rules", "outbound", "reached"),
    [
        ([], "enabled", {GOOD, OTHER, PRIVATE, GOOD6}),
        ([METADATA], "enabled", {GOOD, OTHER, PRIVATE, GOOD6, METADATA}),
        ([GOOD], "allow-list", {GOOD}),
        ([f"{GOOD}:{_PORT}"], "allow-list", {GOOD}),
        ([f"{GOOD}:{_PORT + 1}"], "allow-list", set()),
        (["198.51.100.0/28"], "allow-list", {GOOD}),
        ([GOOD6], "allow-list", {GOOD6}),
        (["good.test", "*"], "allow-list", set()),
        (["good.test", OTHER], "allow-list", {OTHER}),
        ([], "allow-list", set()),
    ],
)
async def test_policies(
    runtime: LocalRuntime, world: World, rules: list[str], outbound: str, reached: set[str]
) -> None:
    box = await _box(runtime, outbound="disabled")
    await box.network.update(outbound, allow=rules)
    everybody = (GOOD, OTHER, PRIVATE, METADATA, GOOD6)
    assert {address for address in everybody if await _ask(box, address) == b"hello"} == reached
    assert len(world.datagrams) == len(reached)
    refused = {refusal.peer: refusal for refusal in await box.network.log() if refusal.protocol == "udp"}
    expected = {address for address in everybody if address not in reached}
    assert {peer.rpartition(":")[0].strip("[]") for peer in refused} == expected


async def test_a_disabled_network_has_none(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, outbound="disabled")
    for address in (GOOD, GOOD6):
        assert await _ask(box, address) == b""
    assert not world.datagrams


async def test_the_host_must_be_named(runtime: LocalRuntime, world: World) -> None:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2)]
        for server, address in zip(servers, (HOST, "127.0.0.1"), strict=True):
            server.bind((address, 0))
            _echo(server)
        ports = [server.getsockname()[1] for server in servers]
        box = await _box(runtime, outbound="enabled")
        assert await _ask(box, HOST, ports[0]) == b""
        assert await _ask(box, GATEWAY_ADDRESS, ports[1]) == b""
        await box.network.update("enabled", allow=[HOST, f"host.hutch.internal:{ports[1]}"])
        assert await _ask(box, HOST, ports[0]) == b"hello"
        assert await _ask(box, GATEWAY_ADDRESS, ports[1]) == b"hello"
        assert await _ask(box, GATEWAY_ADDRESS, ports[0]) == b""
        for server in servers:
            with contextlib.suppress(OSError):  # it has no peer, but its reader wakes up
                server.shutdown(socket.SHUT_RDWR)


async def test_sizes(runtime: LocalRuntime, world: World, isolation: str) -> None:
    """All that there are. But over IPv6 the emulator of a VM takes no long frames: what fits into a short one goes
    out."""
    box = await _box(runtime, GOOD, GOOD6)
    for size in (0, 1, 1473, 9001, 65507):
        assert await _ask(box, GOOD, text=os.urandom(size)) == world.datagrams[-1]
        assert len(world.datagrams[-1]) == size
    assert await _ask(box, GOOD6, text=bytes(1452)) == bytes(1452)
    longer = await box.run("talk", "udp", GOOD6, str(_PORT), "2" if isolation == "vm" else "10", input=bytes(9001))
    assert longer.stdout == (b"" if isolation == "vm" else bytes(9001))
    with world.open(socket.AF_INET6, socket.SOCK_DGRAM, GOOD6, 9100) as peer:
        caller = await _chat(box, GOOD6, 9100)
        await caller.send(b"hello")
        peer.settimeout(10)
        _, gateway = await anyio.to_thread.run_sync(peer.recvfrom, 100)
        peer.sendto(bytes(9001), gateway)  # whole, whatever the way
        answer = b""
        while len(answer) < 9001:
            answer += await caller.receive()
        assert answer == bytes(9001)
        await caller.close()


async def test_refusals_are_told_at_once(runtime: LocalRuntime, world: World) -> None:
    """A program that would rather speak UDP need not wait for a time-out, and learns which of two reasons it is."""
    box = await _box(runtime, GOOD)
    for address, words in ((OTHER, "No route to host"), (GOOD, "Connection refused")):
        with anyio.fail_after(8):  # the program would wait for 10 s
            done = await box.run("talk", "udp", address, "9", "10", input=b"hello")
        assert (done.exit_code, words in done.stderr.decode()) == (1, True), done.stderr


async def test_only_the_peer_asked_can_answer(runtime: LocalRuntime, world: World) -> None:
    """Not another address, nor another port of the same: they do know where to, since the peer tells them."""
    with contextlib.ExitStack() as stack:
        peer, other, neighbour = (
            stack.enter_context(world.open(socket.AF_INET, socket.SOCK_DGRAM, address, port))
            for address, port in ((GOOD, 9100), (OTHER, 9100), (GOOD, 9101))
        )
        box = await _box(runtime, "198.51.100.0/24")
        caller = await _chat(box, GOOD, 9100)
        await caller.send(b"hello")
        peer.settimeout(10)
        data, gateway = await anyio.to_thread.run_sync(peer.recvfrom, 100)
        assert data == b"hello"
        for stranger in (other, neighbour):
            stranger.sendto(b"forged", gateway)
        peer.sendto(b"true", gateway)
        assert await caller.receive() == b"true"
        await caller.end()
        assert await caller.receive_all() == b""
        await caller.close()


async def test_a_new_policy_ends_conversations(runtime: LocalRuntime, world: World) -> None:
    """Also for answers that are under way. Others go on."""
    peer = world.open(socket.AF_INET, socket.SOCK_DGRAM, OTHER, 9100)
    with peer:
        box = await _box(runtime, GOOD, OTHER)
        kept, ended = await _chat(box, GOOD, _PORT), await _chat(box, OTHER, 9100)
        await kept.send(b"1")
        assert await kept.receive() == b"1"
        await ended.send(b"1")
        peer.settimeout(10)
        _, gateway = await anyio.to_thread.run_sync(peer.recvfrom, 100)
        peer.sendto(b"in time", gateway)
        assert await ended.receive() == b"in time"
        await box.network.update(allow=[GOOD])
        peer.sendto(b"late", gateway)
        await kept.send(b"2")
        assert await kept.receive() == b"2"
        await ended.end()
        assert await ended.receive_all() == b""
        for caller in (kept, ended):
            await caller.close()
        assert f"{OTHER}:9100" in {refusal.peer for refusal in await box.network.log()}


async def test_spoofed_sources_and_fragments(runtime: LocalRuntime, world: World, isolation: str) -> None:
    """By raw sockets. Whole or in pieces, a packet goes where the policy allows and nowhere else, and from the host. In
    a container it must come from the box itself. What a VM says of its sender counts for nothing: the emulator makes a
    datagram of its own of it. Of pieces it hears nothing."""
    own, another = ("192.0.2.130", "192.0.2.2") if isolation == "vm" else ("192.0.2.2", "192.0.2.130")
    texts = {"raw": b"raw\0\0\0\0\0", "pieces": b"raw\0\0\0\0\0rest\0\0\0\0"}
    box = await _box(runtime, GOOD)
    with tapped(world) as tap:
        for kind in texts:
            for source in (HOST, OTHER, GATEWAY_ADDRESS, GOOD, another):
                await box.run("talk", kind, source, GOOD, str(_PORT))
            for source in (own, HOST, OTHER):
                for address in (OTHER, METADATA, PRIVATE, HOST):
                    await box.run("talk", kind, source, address, str(_PORT))
        assert await _ask(box, GOOD, text=b"last") == b"last"  # so those before were judged
        *arrived, _ = world.datagrams
        assert set(arrived) == ({texts["raw"]} if isolation == "vm" else set())
        for kind, text in texts.items():
            world.reset()
            assert (await box.run("talk", kind, own, GOOD, str(_PORT))).ok
            expected = [] if (isolation, kind) == ("vm", "pieces") else [text]
            assert await _ask(box, GOOD, text=b"last") == b"last"
            assert world.datagrams == [*expected, b"last"]
        assert {packet[:2] for packet in tap.packets()} == {(HOST, GOOD)}


async def test_a_flood_of_conversations_is_bounded(runtime: LocalRuntime, home: Path, world: World) -> None:
    """The oldest ones end; what begins later works, for this box and others."""
    box, other = await _box(runtime, GOOD), await _box(runtime, GOOD)
    kept = await _chat(other, GOOD, _PORT)
    await kept.send(b"1")
    assert await kept.receive() == b"1"
    (gateway,) = gateways(home)
    assert (await box.run("talk", "flood", GOOD, "3000", timeout=60)).ok
    with anyio.fail_after(20):  # what comes while the flood is worked off may be lost
        while (await box.run("talk", "udp", GOOD, str(_PORT), "1", input=b"hello")).stdout != b"hello":
            pass
    assert len(os.listdir(f"/proc/{gateway}/fd")) < 700
    await kept.send(b"2")
    assert await kept.receive() == b"2"
    await kept.close()


async def test_quiet_conversations_end(world: World, talk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A door of our own, in a namespace with nothing else, that waits for less."""
    monkeypatch.setattr(flows, "_IDLE_SECONDS", 0.3)
    monkeypatch.setattr(flows, "_SWEEP_SECONDS", 0.05)
    command = ["unshare", "-n", "sh", "-c", "ip link set lo up; echo; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdout.readline()
        sockets = await netns.open_door(os.pidfd_open(holder.pid))
        served = flows.Flows(lambda peer: peer.address, lambda peer: True, lambda peer, reason: None, Meter())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(served.run, [flows.Way(sockets.udp4, sockets.raw4)])
            before = _open_files()
            inside = ["nsenter", f"--net=/proc/{holder.pid}/ns/net", "--"]
            done = await anyio.run_process([*inside, talk, "udp", GOOD, str(_PORT), "10"], input=b"hello")
            assert done.stdout == b"hello"
            assert await poll_until(lambda: _open_files() == before, 10)
            tasks.cancel_scope.cancel()
        for each in sockets.all():
            each.close()
        holder.stdin.close()


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
