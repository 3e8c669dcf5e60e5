"""Attempts of a VM to get past its door. Its root may do to its card and its network what it likes: what leaves the
emulator are sockets."""

from __future__ import annotations

import ipaddress
import struct
import subprocess
from typing import TYPE_CHECKING

import dns.message
import pytest

from hutch.host.proc import poll_until
from tests.net.conftest import IMAGE, call, get
from tests.net.world import GOOD, GOOD6, HOST, NAMES, OTHER

if TYPE_CHECKING:
    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from tests.net.world import World

pytestmark = pytest.mark.anyio

STACK, GUEST = "192.0.2.129", "192.0.2.130"
"""The other end of the guest's link, and the guest."""
TAKE_THE_CARD = f"""
for device in /sys/bus/virtio/devices/*; do
    if [ $(cat $device/device) = 0x0001 ]; then echo ${{device##*/}} > /sys/bus/virtio/drivers/virtio_net/bind; fi
done
ip addr add {GUEST}/28 dev eth0 && ip link set eth0 up && ip route add default via {STACK}
"""


async def _vm(runtime: LocalRuntime, *rules: str) -> LocalBox:
    box = await runtime.create(IMAGE, isolation="vm", network=list(rules) or "disabled")
    await box.start()
    return box


async def _in_its_namespace(box: LocalBox, *words: str) -> str:
    pid = (await box.info()).pid
    command = ["nsenter", "-t", str(pid), "-n", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout


def _datagram(source: str, target: str, port: int, payload: bytes) -> bytes:
    """A frame with a datagram in it."""
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(target).packed
    udp = struct.pack(">HHHH", 4444, port, 8 + len(payload), 0) + payload
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack(">10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack(">H", ~total & 0xFFFF) + head[12:]
    return bytes.fromhex("525500000001 525400123456 0800") + head + udp


async def test_a_card_that_the_policy_does_not_give_leads_nowhere(runtime: LocalRuntime, world: World) -> None:
    """A disabled box whose root takes the card by itself. The control is the same box once its policy allows it."""
    box = await _vm(runtime)
    assert (await box.run("sh", "-c", TAKE_THE_CARD)).ok
    assert (await box.run("busybox", "ping", "-c", "1", "-W", "5", STACK)).ok  # the link is there
    for address, port in ((GOOD, "80"), (NAMES, "53"), (STACK, "80"), (HOST, "80")):
        assert not (await box.run("nc", "-w", "1", address, port)).ok, address
    question = dns.message.make_query("good.test", "A").to_wire()
    for address, port, data in ((GOOD, "9999", b"x"), ("192.0.2.1", "53", question), (NAMES, "53", question)):
        assert not (await box.run("talk", "udp", address, port, "1", input=data)).ok
    assert not (await box.run("busybox", "ping", "-c", "1", "-W", "2", GOOD)).ok
    assert not world.requests and not world.queries and not world.datagrams
    assert await _in_its_namespace(box, "ip", "route") == ""
    addresses = (await _in_its_namespace(box, "ip", "-o", "addr")).splitlines()
    assert {line.split()[3] for line in addresses} == {"127.0.0.1/8", "::1/128"}
    await box.network.update(allow=["good.test"])
    assert await get(box, GOOD, "good.test") == f"{GOOD} good.test /"


async def test_frames_with_any_source_stay_in_the_emulator(runtime: LocalRuntime, world: World) -> None:
    box = await _vm(runtime, "good.test")
    question = dns.message.make_query("good.test", "A").to_wire()
    # The control: frames do get as far as sockets; a name that a rule admits is looked up, whoever says to ask.
    await box.run("talk", "frame", "eth0", input=_datagram(GUEST, "192.0.2.1", 53, question))
    assert await poll_until(lambda: ("good.test", "A") in world.queries, 10)
    world.reset()
    secret = dns.message.make_query("secret.attacker.test", "A").to_wire()
    for source in (GUEST, HOST, OTHER, "192.0.2.1", "192.0.2.2", "127.0.0.1", "255.255.255.255"):
        for target in (GOOD, STACK, "127.0.0.1", "192.0.2.2"):
            await box.run("talk", "frame", "eth0", input=_datagram(source, target, 9999, b"raw"))
        for target in (NAMES, "192.0.2.1", STACK):
            await box.run("talk", "frame", "eth0", input=_datagram(source, target, 53, secret))
        await box.run("talk", "raw", source, GOOD, "9999")
    await box.run("talk", "frame", "eth0", input=b"\xff" * 1500)
    await box.run("talk", "frame", "eth0", input=_datagram(GUEST, GOOD, 9999, b"cut")[:30])
    assert await get(box, GOOD, "good.test") == f"{GOOD} good.test /"
    assert not world.datagrams and {name for name, _ in world.queries} <= {"good.test"}


async def test_other_addresses_change_nothing(runtime: LocalRuntime, world: World) -> None:
    box = await _vm(runtime, "good.test")
    script = f"""
        ip addr add {HOST}/32 dev eth0 && ip addr add 203.0.113.7/32 dev eth0
        ip -6 addr add 2001:db8:1::77/64 dev eth0 &&
        ip route replace default via {STACK} src 203.0.113.7 && ip link set eth0 address 52:54:00:aa:bb:cc
    """
    assert (await box.run("sh", "-c", script)).ok
    assert await get(box, OTHER, "good.test") == f"{GOOD} good.test /"
    for address in (OTHER, GOOD6, "2001:db8:77:1::1"):
        assert "no rule" in await get(box, address, "other.test") or not world.requests[1:]
    assert len(world.requests) == 1


async def test_the_emulators_own_loopback_has_nothing_for_the_guest(runtime: LocalRuntime, world: World) -> None:
    """The link's other end stands for it; the gateway's own sockets are there, and know where nobody was sent."""
    box = await _vm(runtime, "good.test")
    listening = (await _in_its_namespace(box, "cat", "/proc/self/net/tcp")).splitlines()[1:]
    ports = [int(line.split()[1].partition(":")[2], 16) for line in listening if line.split()[3] == "0A"]
    assert ports
    for address in (STACK, "192.0.2.2"):
        for port in ports:
            caller = await call(box, address, port)
            await caller.send(b"GET / HTTP/1.1\r\nHost: good.test\r\n\r\n")
            assert await caller.receive_all() == b""
            await caller.close()
    assert not world.requests
    assert await get(box, GOOD, "good.test") == f"{GOOD} good.test /"
