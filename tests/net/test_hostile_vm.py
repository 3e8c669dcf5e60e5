"""Attempts of a VM to get past its door. Its root may do to its card and its network what it likes: what leaves the
emulator are sockets."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import subprocess
from socket import SOCK_DGRAM, SOCK_STREAM
from typing import TYPE_CHECKING

import anyio
import dns.message
import pytest

from hutch.host.proc import poll_until
from tests.net.conftest import IMAGE, call, get
from tests.net.packets import (
    ICMP,
    ICMP6,
    MORE_FRAGMENTS,
    TCP,
    UDP,
    echo_request,
    frame,
    ipv4,
    ipv6,
    syn,
    tapped,
    udp,
    whole,
)
from tests.net.world import GOOD, GOOD6, HOST, HOST6, METADATA, NAMES, OTHER, PRIVATE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from tests.net.world import World

pytestmark = pytest.mark.anyio

STACK, GUEST, GUEST6 = "192.0.2.129", "192.0.2.130", "2001:db8:77:1::2"
"""The other end of the guest's link, and the guest."""
KNOCK = ("busybox", "arping", "-f", "-c", "1", "-w", "2", "-I", "eth0", STACK)
SOURCES = (GUEST, HOST, OTHER, "192.0.2.1", "192.0.2.2", "127.0.0.1", "255.255.255.255")
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


async def _send(box: LocalBox, *frames: bytes) -> None:
    """By the card, as they are."""
    assert (await box.run("talk", "frames", "eth0", input=_with_lengths(*frames))).ok


def _with_lengths(*frames: bytes) -> bytes:
    return b"".join(len(each).to_bytes(2, "big") + each for each in frames)


def _datagram(source: str, target: str, port: int, data: bytes) -> bytes:
    return frame(whole(source, target, UDP, udp(source, target, port, data)))


async def test_a_card_that_the_policy_does_not_give_leads_nowhere(runtime: LocalRuntime, world: World) -> None:
    """A disabled box whose root takes the card by itself: it has no link, so not even the emulator's parser hears it.
    The control is the same box once its policy allows it."""
    box = await _vm(runtime)
    assert (await box.run("sh", "-c", TAKE_THE_CARD)).ok
    assert (await box.run("cat", "/sys/class/net/eth0/carrier")).text.strip() == "0"
    question = dns.message.make_query("good.test", "A").to_wire()
    last = frame(ipv4(GUEST, STACK, UDP, bytes(100), fragment=1))
    await _send(box, last, *(_datagram(GUEST, each, 53, question) for each in ("192.0.2.1", NAMES, STACK)))
    for address, port in ((GOOD, "80"), (NAMES, "53"), (STACK, "80"), (HOST, "80")):
        assert not (await box.run("nc", "-w", "1", address, port)).ok, address
    for address, port, data in ((GOOD, "9999", b"x"), ("192.0.2.1", "53", question), (NAMES, "53", question)):
        assert not (await box.run("talk", "udp", address, port, "1", input=data)).ok
    assert not (await box.run(*KNOCK)).ok
    assert not world.requests and not world.queries and not world.datagrams
    assert await _in_its_namespace(box, "ip", "route") == ""
    addresses = (await _in_its_namespace(box, "ip", "-o", "addr")).splitlines()
    assert {line.split()[3] for line in addresses} == {"127.0.0.1/8", "::1/128"}
    await box.network.update(allow=["good.test"])
    with anyio.fail_after(20):
        while not ((await box.run(*KNOCK)).ok and (await box.run("nc", "-w", "1", GOOD, "80")).ok):
            pass  # the guest had given its neighbour up
    assert await get(box, GOOD, "good.test") == f"{GOOD} good.test /"


async def test_frames_with_any_source_stay_in_the_emulator(runtime: LocalRuntime, world: World) -> None:
    """Where only names are allowed, no datagram leaves but the gateway's own questions about them."""
    box = await _vm(runtime, "good.test")
    question = dns.message.make_query("good.test", "A").to_wire()
    # The control: frames do get as far as sockets; a name that a rule admits is looked up, whoever says to ask.
    await _send(box, _datagram(GUEST, "192.0.2.1", 53, question))
    assert await poll_until(lambda: ("good.test", "A") in world.queries, 10)
    world.reset()
    secret = dns.message.make_query("secret.attacker.test", "A").to_wire()
    with tapped(world) as tap:
        for source in SOURCES:
            await _send(
                box,
                *(_datagram(source, target, 9999, b"raw") for target in (GOOD, STACK, "127.0.0.1", "192.0.2.2")),
                *(_datagram(source, target, 53, secret) for target in (NAMES, "192.0.2.1", STACK)),
            )
            await box.run("talk", "raw", source, GOOD, "9999")
        await _send(box, b"\xff" * 1500, _datagram(GUEST, GOOD, 9999, b"cut")[:30])
        assert await get(box, GOOD, "good.test") == f"{GOOD} good.test /"
        seen = {packet[:4] for packet in tap.packets()}
        assert {(HOST, GOOD, TCP, 80)} <= seen <= {(HOST, GOOD, TCP, 80), (HOST, NAMES, UDP, 53)}
    assert not world.datagrams and {name for name, _ in world.queries} <= {"good.test"}


async def test_no_frame_reaches_whom_the_policy_does_not_allow(runtime: LocalRuntime, world: World) -> None:
    """Whatever a frame says about its sender and its way: what leaves is for allowed addresses, and from the host's
    own. What is in pieces or has options does not leave at all."""
    with contextlib.ExitStack() as stack:
        tap = stack.enter_context(tapped(world))
        datagrams, connections = (stack.enter_context(_everywhere(kind)) for kind in (SOCK_DGRAM, SOCK_STREAM))
        box = await _vm(runtime, GOOD, GOOD6)
        await _send(box, *_tricks())
        # What was sent first was judged first.
        for address in (GOOD, GOOD6):
            assert (await box.run("talk", "udp", address, "9999", "10", input=b"last")).stdout == b"last"
            assert await get(box, address, "last") == f"{address} last /"
        assert {packet[:2] for packet in tap.packets()} == {(HOST, GOOD), (HOST6, GOOD6)}
        # The controls: the guest's own, and those of made-up senders.
        assert set(world.datagrams) == {b"last", GOOD.encode(), GOOD6.encode()}
        for unheard, receive in ((datagrams, lambda: datagrams.recv(9)), (connections, connections.accept)):
            with pytest.raises(BlockingIOError):
                receive()
            assert unheard.getsockname()[1] in (80, 9999)
        # And these would hear it.
        with socket.create_connection(("127.0.0.1", 80)), socket.socket(socket.AF_INET, SOCK_DGRAM) as control:
            control.sendto(b"control", (HOST, 9999))
            assert datagrams.recv(9) == b"control"
            connections.accept()[0].close()


def _everywhere(kind: int) -> socket.socket:
    """A server on all addresses of the host, its loopback included."""
    server = socket.socket(socket.AF_INET6, kind)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(("::", 9999 if kind == SOCK_DGRAM else 80))
    server.setblocking(False)
    if kind == SOCK_STREAM:
        server.listen()
    return server


def _tricks() -> Iterator[bytes]:
    """Each datagram carries the address that its packet is for."""
    four = (GOOD, OTHER, PRIVATE, METADATA, HOST, STACK, "192.0.2.131", "127.0.0.1", "192.0.2.2", "192.0.2.143")
    translated = [prefix + OTHER for prefix in ("::ffff:", "::", "64:ff9b::")]
    six = (GOOD6, HOST6, "::1", "2001:db8:77:1::1", "2001:db8:77:1::3", "fe80::2", "ff02::1", "2002:c633:6414::1")
    for target in (*four, "255.255.255.255", "224.0.0.1", *six, *translated):
        for source in (GUEST6, HOST6, GOOD6, "::1", "fe80::7") if ":" in target else SOURCES:
            for port in (9999, 67, 69):
                yield _datagram(source, target, port, target.encode())
            yield frame(whole(source, target, TCP, syn(source, target, 80)))
            yield frame(whole(source, target, ICMP6 if ":" in source else ICMP, echo_request(source, target)))
    datagrams = {each: udp(GUEST, each, 9999, f"{each} in pieces".encode()) for each in (GOOD, OTHER)}
    for fragment, piece in ((MORE_FRAGMENTS, slice(8)), (1, slice(8, None))):
        for target, data in datagrams.items():  # by turns, with one number for both
            yield frame(ipv4(GUEST, target, UDP, data[piece], fragment=fragment, number=7))
    for target, other in ((GOOD, OTHER), (OTHER, GOOD)):
        for route in (131, 137):  # loose, strict: on to the other one
            options = bytes((route, 7, 4)) + ipaddress.ip_address(other).packed + b"\0"
            data = udp(GUEST, target, 9999, f"{target} by a route".encode())
            yield frame(ipv4(GUEST, target, UDP, data, options=options))
    inner = udp(GUEST, OTHER, 9999, b"forbidden!")
    yield frame(ipv4(GUEST, OTHER, UDP, inner), tags=bytes.fromhex("81000001"))
    for protocol in (4, 47, 50, 132):  # IP in IP, GRE, ESP, SCTP
        yield frame(ipv4(GUEST, GOOD, protocol, ipv4(GUEST, OTHER, UDP, inner)))
    segments = bytes((UDP, 2, 0, 1, 0, 0, 0, 0)) + ipaddress.ip_address(HOST6).packed
    yield frame(ipv6(GUEST6, GOOD6, 43, segments + udp(GUEST6, HOST6, 9999, b"forbidden!")))
    yield frame(ipv6(GUEST6, GOOD6, 41, ipv6(GUEST6, HOST6, UDP, udp(GUEST6, HOST6, 9999, b"forbidden!"))))


async def test_no_piece_of_a_packet_reaches_the_stack(runtime: LocalRuntime, world: World) -> None:
    """Pieces in every order and place: libslirp 4.7.0 writes outside of its memory when the last one comes first. All
    are lost, whatever they belong to; the emulator goes on."""
    box = await _vm(runtime, GOOD, GOOD6)
    before = await box.info()
    with tapped(world) as tap:
        await _send(box, *_pieces())
        for address in (GOOD, GOOD6):
            assert (await box.run("talk", "udp", address, "9999", "10", input=b"last")).stdout == b"last"
        assert {packet[:2] for packet in tap.packets()} == {(HOST, GOOD), (HOST6, GOOD6)}
    assert world.datagrams == [b"last", b"last"]
    after = await box.info()
    assert (after.state, after.pid, after.started_at) == (before.state, before.pid, before.started_at)


def _pieces() -> Iterator[bytes]:
    body = udp(GUEST, GOOD, 9999, bytes(100))
    for number, protocol in enumerate((UDP, TCP, ICMP)):
        for offset in (1, 2, 100, 0x1FFF):  # the last one before the others, and alone
            yield frame(ipv4(GUEST, GOOD, protocol, body[8:], fragment=offset, number=number))
        for fragment, piece in ((3, slice(24, None)), (MORE_FRAGMENTS, slice(16)), (MORE_FRAGMENTS | 1, slice(8, 32))):
            yield frame(ipv4(GUEST, GOOD, protocol, body[piece], fragment=fragment, number=100 + number))
        for fragment in (0x8000, MORE_FRAGMENTS, MORE_FRAGMENTS | 0x1FFF):
            yield frame(ipv4(GUEST, GOOD, protocol, body, fragment=fragment, number=200 + number))
        for size in (0, 1, 7):
            yield frame(ipv4(GUEST, GOOD, protocol, bytes(size), fragment=1, number=300 + number))
    fragment6 = struct.pack(">BBHI", UDP, 0, 8, 7)
    yield frame(ipv6(GUEST6, GOOD6, 44, fragment6 + body[8:]))
    yield frame(ipv6(GUEST6, GOOD6, 44, struct.pack(">BBHI", UDP, 0, 1, 7) + body[:8]))


async def test_the_stack_offers_nothing(runtime: LocalRuntime, world: World) -> None:
    """No files, no answer to a ping; but it is there."""
    box = await _vm(runtime, GOOD)
    request = b"\0\x01file\0octet\0"
    assert (await box.run("talk", "udp", STACK, "69", "1", input=request)).stdout == b""
    assert not (await box.run("busybox", "ping", "-c", "1", "-W", "1", STACK)).ok
    assert (await box.run(*KNOCK)).ok


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
