"""The rules that need no server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response

from hutch.core.idle import Policy, Step, due
from hutch.core.utf8 import Cutter, whole
from hutch.errors import ConfigError, HutchError, InvalidArgumentError
from hutch.server import policy
from hutch.server.edge import Edge
from hutch.server.settings import ServerSettings
from hutch.server.wire import Receipts

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.types import Message, Receive, Scope, Send


@given(st.text(), st.lists(st.integers(1, 9)), st.integers(4, 16))
def test_text_survives_any_cutting(text: str, sizes: list[int], limit: int) -> None:
    cutter = Cutter(limit)
    data = text.encode("utf-8", "replace")
    pieces: list[bytes] = []
    for size in [*sizes, len(data) + 1]:
        pieces += cutter.feed(data[:size])
        data = data[size:]
    assert cutter.flush() == b""
    assert all(0 < len(piece) <= limit for piece in pieces)
    assert "".join(piece.decode() for piece in pieces) == text.encode("utf-8", "replace").decode()


@given(st.lists(st.binary(max_size=20)), st.integers(4, 16))
def test_bytes_are_never_changed_and_little_is_held_back(chunks: list[bytes], limit: int) -> None:
    cutter = Cutter(limit)
    out = b""
    seen = b""
    for chunk in chunks:
        seen += chunk
        out += b"".join(cutter.feed(chunk))
        assert len(seen) - len(out) <= 3
    assert out + cutter.flush() == b"".join(chunks)


@pytest.mark.parametrize(
    ("data", "held"),
    [
        (b"", 0),
        (b"abc", 0),
        ("ä".encode(), 0),
        ("ä".encode()[:1], 1),
        ("€".encode()[:2], 2),
        ("😀".encode()[:3], 3),
        ("😀".encode(), 0),
        (b"\xff", 0),
        (b"\xc0", 0),
        (b"\x80\x80\x80", 0),
        (b"\xe0\x80", 0),  # over-long: never becomes a character
        (b"\xed\xa0", 0),  # a surrogate
        (b"\xf4\x90", 0),  # beyond the last character
        (b"\xf5", 0),
    ],
)
def test_only_a_character_that_may_still_come_is_held_back(data: bytes, held: int) -> None:
    assert len(data) - whole(data) == held


def test_idle_boxes_are_stopped_and_then_removed() -> None:
    rules = Policy(auto_stop=60, auto_delete=120)
    assert due(rules, running=True, idle=59.9) is Step.NOTHING
    assert due(rules, running=True, idle=60) is Step.STOP
    assert due(rules, running=True, idle=10_000) is Step.STOP
    assert due(rules, running=False, idle=119) is Step.NOTHING
    assert due(rules, running=False, idle=120) is Step.DELETE
    never = Policy()
    assert due(never, running=True, idle=1e9) is due(never, running=False, idle=1e9) is Step.NOTHING


def test_a_policy_survives_its_labels_and_foreign_labels_do_no_harm() -> None:
    rules = Policy(auto_stop=60, auto_delete=120, auto_resume=False)
    labels = {"mine": "1", **policy.to_labels(rules)}
    assert policy.from_labels(labels) == rules
    assert policy.public(labels) == {"mine": "1"}
    for nonsense in ("", "-1", "1e9", "５００", "9" * 30, "5"):
        assert policy.from_labels({"hutch.server/auto-stop": nonsense}).auto_stop == 0
    with pytest.raises(InvalidArgumentError, match="reserved"):
        policy.check_labels(labels)


def test_settings_that_make_no_sense_are_refused(tmp_path: object) -> None:
    for wrong in (
        {"api_keys": ("",)},
        {"api_keys": ("two words",)},
        {"api_keys": ("a",), "read_only_keys": ("a",)},
        {"read_only_keys": ("a",)},
        {"auto_stop": 59},
        {"auto_delete": -1},
    ):
        with pytest.raises(ConfigError):
            ServerSettings(state=tmp_path, **wrong)  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(20):
        await anyio.lowlevel.checkpoint()


class Peer:
    """Collects Pings."""

    def __init__(self) -> None:
        self.pings: list[bytes] = []
        self.receipts = Receipts(self.pings.append, asyncio.get_running_loop())


def test_one_ping_is_on_its_way_and_a_receipt_is_for_what_was_sent_before() -> None:
    async def main() -> None:
        peer = Peer()
        done: list[int] = []

        async def confirm(number: int) -> None:
            assert await peer.receipts.confirm()
            done.append(number)

        async with anyio.create_task_group() as tasks:
            for number in (1, 2, 3):
                tasks.start_soon(confirm, number)
            await settle()
            assert len(peer.pings) == 1
            peer.receipts.received(b"something else")
            peer.receipts.received(peer.pings[0])
            await settle()
            assert done == [1] and len(peer.pings) == 2
            peer.receipts.received(peer.pings[0])  # again: it is no answer to the second
            await settle()
            assert done == [1]
            peer.receipts.received(peer.pings[1])
        assert sorted(done) == [1, 2, 3]

    anyio.run(main)


def test_a_lost_connection_gives_no_receipt() -> None:
    async def main() -> None:
        peer = Peer()
        async with anyio.create_task_group() as tasks:

            async def confirm() -> None:
                assert not await peer.receipts.confirm()

            tasks.start_soon(confirm)
            await settle()
            peer.receipts.lost()
        assert not await peer.receipts.confirm()

    anyio.run(main)


def test_nobody_waits_for_a_receipt_while_none_can_come() -> None:
    async def main() -> None:
        peer = Peer()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(peer.receipts.confirm)
            await settle()
            peer.receipts.waive(True)
        assert await peer.receipts.confirm()
        peer.receipts.waive(False)
        assert not await peer.receipts.alive(0.01)

    anyio.run(main)


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "field"), [("/v1/boxes", "body_seconds"), ("/v1/boxes/import", "stall_seconds")])
async def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path, path: str, field: str) -> None:
    sent: list[Message] = []
    pieces = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(HutchError):
            while (await receive()).get("more_body"):
                pass
        await Response(status_code=400)(scope, receive, send)

    async def receive() -> Message:
        if pieces:
            return pieces.pop()
        await anyio.sleep_forever()
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    edge = Edge(application, ServerSettings(state=tmp_path, **{field: 0.05}))  # type: ignore[arg-type]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": []}
    with anyio.fail_after(5):
        await edge({**scope, "query_string": b""}, receive, send)
    assert sent[0]["status"] == 408 and b'"code":"timeout"' in sent[1]["body"]
