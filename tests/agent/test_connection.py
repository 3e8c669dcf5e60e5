"""Frames and connections: hello, garbage, floods."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING

import pytest

from .client import HEADER, WINDOW, Client, Fault, Kind, shell, start_payload

if TYPE_CHECKING:
    from .support import Agent


def test_hello(client: Client) -> None:
    reply = client.request(Kind.HELLO, struct.pack("<I", 1))
    assert reply.type == Kind.HELLO_OK
    assert struct.unpack("<IIII", reply.payload)[:3] == (1, WINDOW, 1)
    assert client.request(Kind.HELLO, struct.pack("<I", 2)).failure[0] == Fault.UNSUPPORTED


def test_ping(client: Client) -> None:
    reply = client.request(Kind.PING, b"x" * 64)
    assert (reply.type, reply.payload) == (Kind.PONG, b"x" * 64)
    assert client.request(Kind.PING, b"x" * 65).failure[0] == Fault.INVALID


def test_what_only_a_vm_can(client: Client) -> None:
    for kind, payload in ((Kind.CLOCK, bytes(8)), (Kind.NETWORK, bytes(42))):
        assert client.request(kind, payload).failure[0] == Fault.UNSUPPORTED
        assert client.request(kind, payload + b"x").failure[0] == Fault.INVALID


BAD_FRAMES = {
    "length": HEADER.pack((1 << 20) + 1, Kind.PING, 0, 0, 1, b""),
    "type 0": HEADER.pack(0, 0, 0, 0, 1, b""),
    "unknown type": HEADER.pack(0, 63, 0, 0, 1, b""),
    "reply type": HEADER.pack(0, Kind.OK, 0, 0, 1, b""),
    "stream": HEADER.pack(0, Kind.PING, 3, 0, 1, b""),
    "zero": HEADER.pack(0, Kind.PING, 0, 1, 1, b""),
    "id character": HEADER.pack(0, Kind.PING, 0, 0, 1, b"a-b"),
    "id hole": HEADER.pack(0, Kind.PING, 0, 0, 1, b"a\0b"),
    "ack size": HEADER.pack(4, Kind.ACK, 1, 0, 0, b"a") + b"1234",
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_malformed_frame_ends_only_its_connection(agent: Agent, client: Client, name: str) -> None:
    with agent.client() as bad:
        bad.send_raw(BAD_FRAMES[name])
        with pytest.raises((EOFError, ConnectionResetError)):
            bad.next()
    assert client.request(Kind.PING).type == Kind.PONG


def test_garbage_never_ends_the_agent(agent: Agent, client: Client) -> None:
    """Random bytes, and random but well-formed frames (except START and POWEROFF, which would do what they say)."""
    chance = random.Random(7)
    kinds = [k for k in range(1, 16) if k not in (Kind.START, Kind.POWEROFF)]
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
    assert client.request(Kind.PING).type == Kind.PONG
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
        assert client.start(f"f{number}", bytes(bent)).type in (Kind.STARTED, Kind.FAILED)
    assert agent.alive


def test_a_frame_may_arrive_byte_by_byte(client: Client) -> None:
    frame = HEADER.pack(3, Kind.PING, 0, 0, 77, b"") + b"abc"
    for byte in frame:
        client.send_raw(bytes([byte]))
    assert client.reply(77).payload == b"abc"


def test_connection_flood_is_capped(agent: Agent, client: Client) -> None:
    assert client.request(Kind.PING).type == Kind.PONG
    flood = [agent.client() for _ in range(100)]
    closed = 0
    for other in flood:
        try:
            closed += other.request(Kind.PING).type != Kind.PONG
        except (EOFError, OSError):
            closed += 1
    assert closed == 100 - 63
    for other in flood:
        other.close()
    assert client.request(Kind.PING).type == Kind.PONG
    with agent.client() as again:
        assert again.request(Kind.PING).type == Kind.PONG


def test_a_host_that_reads_nothing_is_disconnected_at_last(agent: Agent, client: Client) -> None:
    with agent.client(20.0) as deaf, pytest.raises(OSError):
        for _ in range(200_000):
            deaf.send(Kind.PING, b"x" * 64, req=1)
    assert client.request(Kind.PING).type == Kind.PONG
