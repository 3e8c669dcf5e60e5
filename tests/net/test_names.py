"""The name service of a box."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
import dns.flags
import dns.message
import dns.rcode
import pytest

from tests.net.conftest import IMAGE, call
from tests.net.world import GOOD, GOOD6, HOST, NAMES

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from tests.net.world import World

pytestmark = pytest.mark.anyio


async def _box(runtime: LocalRuntime, network: str | list[str] = "enabled") -> LocalBox:
    box = await runtime.create(IMAGE, network=network)
    await box.start()
    return box


async def _ask(
    box: LocalBox, name: str, kind: str, *, server: str = "192.0.2.1", stream: bool = False
) -> dns.message.Message:
    query = dns.message.make_query(name, kind)
    wire = query.to_wire()
    if stream:
        caller = await call(box, server, 53)
        await caller.send(len(wire).to_bytes(2, "big") + wire)
        data = await caller.receive()
        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
            data += await caller.receive()
        await caller.close()
        return dns.message.from_wire(data[2:])
    result = await box.run("talk", "udp", server, "53", "5", input=wire)
    answer = dns.message.from_wire(result.stdout)
    assert query.is_response(answer)
    return answer


def _records(answer: dns.message.Message) -> list[str]:
    return sorted(record.to_text() for records in answer.answer for record in records)


async def test_addresses_of_both_kinds(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime)
    assert _records(await _ask(box, "both.test", "A")) == [GOOD]
    assert _records(await _ask(box, "both.test", "AAAA")) == [GOOD6]
    assert _records(await _ask(box, "good.test", "AAAA")) == []
    assert _records(await _ask(box, "good.test", "TXT")) == ['"some text"']


async def test_any_server_that_the_box_asks_is_the_gateway(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime)
    for server in ("8.8.8.8", HOST, "2001:db8:1::53"):
        assert _records(await _ask(box, "good.test", "A", server=server)) == [GOOD]


async def test_negative_answers(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime)
    assert (await _ask(box, "missing.test", "A")).rcode() == dns.rcode.NXDOMAIN


async def test_long_answers_are_cut_and_come_whole_by_a_stream(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime)
    cut = await _ask(box, "big.test", "A")
    assert cut.flags & dns.flags.TC and not cut.answer
    assert len(_records(await _ask(box, "big.test", "A", stream=True))) == 150
    assert len(_records(await _ask(box, "big.test", "A", stream=True, server="9.9.9.9"))) == 150


async def test_answers_are_remembered(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime)
    for _ in range(3):
        assert (await _ask(box, "missing.test", "A")).rcode() == dns.rcode.NXDOMAIN
        assert _records(await _ask(box, "both.test", "A")) == [GOOD]
    assert world.queries.count(("both.test", "A")) < 3


async def test_a_silent_server_is_an_error_not_a_hang(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime)
    query = dns.message.make_query("silent.test", "A").to_wire()
    result = await box.run("talk", "udp", "192.0.2.1", "53", "20", input=query)
    assert dns.message.from_wire(result.stdout).rcode() == dns.rcode.SERVFAIL


async def test_with_addresses_in_the_list_other_names_may_lead_there(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, ["10.9.0.0/16"])
    assert _records(await _ask(box, "private.test", "A")) == ["10.9.0.5"]
    assert _records(await _ask(box, "metadata.test", "A")) == []


async def test_a_private_answer_is_left_out(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, ["private.test", "good.test"])
    assert _records(await _ask(box, "private.test", "A")) == []
    assert _records(await _ask(box, "good.test", "A")) == [GOOD]
    assert "private or reserved" in (await box.network.log())[0].reason


async def test_refusals_are_answers(runtime: LocalRuntime, world: World) -> None:
    box = await _box(runtime, ["good.test"])
    assert (await _ask(box, "other.test", "A")).rcode() == dns.rcode.REFUSED
    (refusal,) = await box.network.log()
    assert (refusal.protocol, refusal.peer) == ("dns", "other.test")


async def test_names_carry_little_out(runtime: LocalRuntime, world: World, talk: Path) -> None:
    """As many lookups as it can, of whatever servers, by datagrams and streams at once: a box gets about 20 a second
    after a burst of 200. The control does the same from outside; other boxes notice nothing."""
    queries = [dns.message.make_query(f"{number}.tunnel.test", "A").to_wire() for number in range(400)]
    pieces = b"".join(len(query).to_bytes(2, "big") + query for query in queries)
    seconds, most = 5.0, 200 + 20 * 5
    again = "while :; do talk datagrams {} 53 < /tmp/queries; done"
    with anyio.move_on_after(seconds):
        while len(world.queries) < 4 * most:
            await anyio.run_process([talk, "datagrams", NAMES, "53"], input=pieces)
    assert len(world.queries) >= 4 * most
    box, other = await _box(runtime), await _box(runtime)
    assert (await box.run("sh", "-c", "cat > /tmp/queries", input=pieces)).ok
    world.reset()
    begun = time.monotonic()
    stream = "while :; do nc -w 1 192.0.2.1 53 < /tmp/queries > /dev/null; done"
    tunnel = await box.exec(
        "sh", "-c", f"{again.format('192.0.2.1')} & {again.format('9.9.9.9')} & {stream}", timeout=seconds
    )
    assert _records(await _ask(other, "both.test", "A")) == [GOOD]
    await tunnel.wait()
    assert _records(await _ask(other, "both.test", "AAAA")) == [GOOD6]
    passed = sum(name.endswith(".tunnel.test") for name, _ in world.queries)
    assert 100 < passed <= 200 + 20 * (time.monotonic() - begun)
    question = dns.message.make_query("good.test", "A").to_wire()
    with anyio.fail_after(20):  # it is slowed down, not shut out
        while not (await box.run("talk", "udp", "192.0.2.1", "53", "1", input=question)).ok:
            pass
