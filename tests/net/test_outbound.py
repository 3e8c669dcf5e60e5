"""Policies and protocols: what each policy lets through, with the same attempt by a box that may as the control."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from tests.net.conftest import IMAGE, call, get, get_tls
from tests.net.world import GOOD, GOOD6, HOST, METADATA, NOWHERE, OTHER, PRIVATE

if TYPE_CHECKING:
    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from tests.net.world import World

pytestmark = pytest.mark.anyio


async def _box(runtime: LocalRuntime, *rules: str, outbound: str = "") -> LocalBox:
    box = await runtime.create(IMAGE, network=outbound or list(rules))
    await box.start()
    return box


async def _reasons(box: LocalBox) -> list[str]:
    return [refusal.reason for refusal in await box.network.log()]


async def test_disabled_has_nothing_but_its_loopback(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, outbound="disabled")
    for words in (
        ["nc", "-w", "3", GOOD, "80"],
        ["nc", "-w", "3", GOOD6, "80"],
        ["busybox", "ping", "-c1", "-W2", GOOD],
    ):
        assert not (await box.run(*words)).ok
    assert not (await box.run("talk", "udp", GOOD, "9999", "2", input=b"x")).ok
    assert not (await box.run("busybox", "nslookup", "good.test")).ok
    assert (await box.run("ip", "route")).text == ""
    assert not world.requests and not world.queries and not world.datagrams


async def test_enabled_reaches_everybody(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, outbound="enabled")
    assert await get(box, GOOD, "anything") == f"{GOOD} anything /"
    assert await get(box, PRIVATE, "anything") == f"{PRIVATE} anything /"
    assert await get(box, GOOD6, "anything") == f"{GOOD6} anything /"
    assert await get_tls(box, GOOD, "good.test", world.ca) == f"{GOOD} good.test /"
    assert "198.51.100.10" in (await box.run("busybox", "nslookup", "good.test")).text


async def test_enabled_still_refuses_metadata_and_the_host(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, outbound="enabled")
    for address in (METADATA, "198.51.100.1", "0.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"):
        assert await get(box, address, "x") == "", address
    assert not world.requests
    assert METADATA in {refusal.peer.rpartition(":")[0].strip("[]") for refusal in await box.network.log()}


async def test_the_host_must_be_named(runtime: LocalRuntime, world: World) -> None:
    """A server of the host, on an address that others reach as well."""
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        world.http(connection)

        threading.Thread(target=serve, daemon=True).start()
        box = await _box(runtime, outbound="enabled")
        assert await get(box, HOST, "x", port) == ""
        assert not world.requests
        await box.network.update("enabled", allow=[f"{HOST}:{port}"])
        assert await get(box, HOST, "x", port) == f"{HOST} x /"
        server.shutdown(socket.SHUT_RDWR)


async def test_the_hosts_loopback_has_a_name(runtime: LocalRuntime, world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        box = await _box(runtime, f"host.hutch.internal:{port}")
        caller = await call(box, "host.hutch.internal", port)
        server.settimeout(10)
        connection, _ = await anyio.to_thread.run_sync(server.accept)
        with connection:
            connection.sendall(b"from the host")
        assert await caller.receive_all() == b"from the host"
        await caller.close()
        assert await get(box, "host.hutch.internal", "x", port % 65535 + 1) == ""


async def test_metadata_can_be_named(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, METADATA)
    assert await get(box, METADATA, "x") == f"{METADATA} x /"


async def test_an_address_rule_admits_that_address_and_port_alone(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, f"{GOOD}/32:80")
    assert await get(box, GOOD, "x") == f"{GOOD} x /"
    assert await get(box, OTHER, "x") == ""
    assert await get_tls(box, GOOD, "good.test", world.ca) == ""
    assert len(world.requests) == 1
    assert await _reasons(box) == ["the policy has no rule for the address"] * 2


async def test_a_network_rule_admits_its_addresses(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, "198.51.100.0/28")
    assert await get(box, GOOD, "x") == f"{GOOD} x /"
    assert await get(box, OTHER, "x") == ""


async def test_an_ipv6_rule_admits_ipv6_alone(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, f"[{GOOD6}]:80")
    assert await get(box, GOOD6, "x") == f"{GOOD6} x /"
    assert await get(box, GOOD, "x") == ""


async def test_a_name_rule_admits_by_host_and_by_server_name(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, "good.test")
    assert await get(box, GOOD, "good.test") == f"{GOOD} good.test /"
    assert await get_tls(box, GOOD, "good.test", world.ca) == f"{GOOD} good.test /"
    assert "has no rule for the name" in await get(box, GOOD, "other.test")
    assert await get_tls(box, GOOD, "other.test", world.ca) == ""
    assert await get_tls(box, GOOD, None, world.ca) == ""


async def test_the_gateway_looks_the_name_up_itself(runtime: LocalRuntime, world: World) -> None:
    """Wherever the box points an allowed name, the connection goes to where it really leads."""
    box = await _box(runtime, "good.test")
    for address in (OTHER, NOWHERE, PRIVATE):
        assert await get(box, address, "good.test") == f"{GOOD} good.test /"
        assert await get_tls(box, address, "good.test", world.ca) == f"{GOOD} good.test /"


async def test_wildcards_and_ports(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, "*.good.test:80")
    assert await get(box, GOOD, "sub.good.test") == f"{GOOD} sub.good.test /"
    assert "no rule" in await get(box, GOOD, "good.test")
    assert await get_tls(box, GOOD, "sub.good.test", world.ca) == ""


@pytest.mark.parametrize("name", ["private.test", "metadata.test", "loopback.test", "host.test"])
async def test_a_name_may_not_lead_to_a_private_address(runtime: LocalRuntime, world: World, name: str) -> None:
    box = await _box(runtime, name)
    assert "private or reserved address" in await get(box, GOOD, name)
    assert await get_tls(box, GOOD, name, world.ca) == ""
    assert not world.requests


async def test_a_name_may_lead_to_a_private_address_that_is_allowed(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, "private.test", "10.9.0.0/16")
    assert await get(box, GOOD, "private.test") == f"{PRIVATE} private.test /"
    assert "private or reserved" not in " ".join(await _reasons(box))


async def test_other_protocols_pass_by_address_not_by_name(runtime: LocalRuntime, world: World) -> None:
    for rule, expected in (("good.test", b""), (GOOD, b"hello")):
        box = await _box(runtime, rule)
        caller = await call(box, GOOD, 7777)
        await caller.send(b"hello")
        await caller.end()
        assert await caller.receive_all() == expected
        await caller.close()


async def test_pings_go_nowhere(runtime: LocalRuntime, world: World) -> None:
    subprocess.run(["busybox", "ping", "-c", "1", "-W", "2", GOOD], check=True, capture_output=True, timeout=10)
    box = await _box(runtime, outbound="enabled")
    assert not (await box.run("busybox", "ping", "-c", "1", "-W", "2", GOOD)).ok


async def test_the_policy_changes_while_the_box_runs(runtime: LocalRuntime, world: World) -> None:
    """Connections that the new policy forbids end, others go on."""
    box = await _box(runtime, GOOD, OTHER)
    kept, ended = await call(box, GOOD, 7777), await call(box, OTHER, 80)
    await kept.send(b"1")
    assert await kept.receive() == b"1"
    await ended.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"200 OK" in await ended.receive()
    await box.network.update(allow=[GOOD])
    await ended.receive_all()
    await kept.send(b"2")
    assert await kept.receive() == b"2"
    assert await get(box, OTHER, "x") == ""
    await box.network.update("disabled")
    assert await kept.receive_all() == b""
    assert await get(box, GOOD, "x") == ""
    await box.network.update("enabled")
    assert await get(box, OTHER, "x") == f"{OTHER} x /"
    for caller in (kept, ended):
        await caller.close()


async def test_a_disabled_box_can_get_a_network_while_it_runs(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, outbound="disabled")
    assert await get(box, GOOD, "x") == ""
    await box.network.update(allow=["good.test"])
    assert await get(box, GOOD, "good.test") == f"{GOOD} good.test /"


async def test_the_policy_survives_a_restart_of_the_box(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, "good.test")
    await box.network.update(allow=["other.test"])
    await box.restart(timeout=0)
    assert await get(box, OTHER, "other.test") == f"{OTHER} other.test /"
    assert "no rule" in await get(box, OTHER, "good.test")


async def test_traffic_is_counted(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, outbound="enabled")
    caller = await call(box, GOOD, 7777)
    await caller.send(b"x" * 100_000)
    await caller.end()
    assert len(await caller.receive_all()) == 100_000
    await caller.close()
    stats = await box.stats()
    assert (stats.network_sent_bytes, stats.network_received_bytes, stats.network_connections) == (100_000, 100_000, 1)
