"""How long a server keeps what has ended, and waits for what is slow, with times that a test can wait for."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
import httpx2
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from hutch.errors import UpstreamUnavailableError
from hutch.runtime.box import LocalBox
from hutch.runtime.runtime import LocalRuntime
from hutch.server.app import make_app
from hutch.server.serve import listen, make_server
from hutch.server.settings import ServerSettings
from tests.server.conftest import IMAGE, make_home

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hutch.runtime.execution import LocalExecution

pytestmark = [pytest.mark.root, pytest.mark.anyio]

KEPT, OWED, HEAD = 1.5, 1.0, 1.0


@pytest.fixture
async def http(tmp_path: Path, images: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a server in this process that keeps things for a short time."""
    home = make_home(tmp_path, images)
    settings = ServerSettings(state=home / "server", keep_finished_seconds=KEPT, owed_seconds=OWED, header_seconds=HEAD)
    with listen("127.0.0.1", 0) as sock:
        async with LocalRuntime(home) as runtime, anyio.create_task_group() as tasks:
            server = make_server(make_app(runtime, settings), settings)
            tasks.start_soon(lambda: server.serve(sockets=[sock]))
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            async with httpx2.AsyncClient(base_url=url, timeout=20) as client:
                yield client
            for info in await runtime.list():
                await runtime.remove(info.id, force=True)
            server.stop()


async def start(http: httpx2.AsyncClient, *command: str) -> str:
    """Start a command in a new box; returns the path of the execution."""
    box = (await http.post("/v1/boxes", json={"image": IMAGE})).json()["box_id"]
    answer = await http.post(f"/v1/boxes/{box}/exec", json={"command": command[0], "args": [*command[1:]]})
    return f"/v1/boxes/{box}/executions/{answer.json()['execution_id']}"


async def ended(http: httpx2.AsyncClient, path: str) -> float:
    """Wait until an execution counts as ended; returns the seconds that this took."""
    began = time.monotonic()
    with anyio.fail_after(20):
        while (await http.get(path)).json()["status"] == "running":  # there is no event for it
            await anyio.sleep(0.05)
    return time.monotonic() - began


async def test_3_3_what_has_ended_is_kept_for_a_while_and_then_reaped(http: httpx2.AsyncClient) -> None:
    path = await start(http, "sh", "-c", "exit 3")
    await ended(http, path)
    await anyio.sleep(KEPT / 3)
    seen = await http.get(path)
    assert (seen.status_code, seen.json()["exit_code"]) == (200, 3)
    await anyio.sleep(KEPT)
    gone = await http.get(path)
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "session_reaped")
    never = await http.get(path[:-12] + "zzzzzzzzzzzz")
    assert (never.status_code, never.json()["error"]["code"]) == (404, "not_found")


async def test_3_5_what_is_owed_is_not_owed_for_ever(http: httpx2.AsyncClient) -> None:
    path = await start(http, "sh", "-c", "seq 1 100000 | head -c 300000; exit 4")
    socket = await connect(str(http.base_url).replace("http", "ws").rstrip("/") + f"{path}/attach", compression=None)
    socket.transport.pause_reading()
    await anyio.sleep(0.3)
    socket.transport.abort()
    assert OWED * 0.8 <= await ended(http, path) <= OWED + 5


async def test_heads_that_trickle_in_are_cut_off(http: httpx2.AsyncClient) -> None:
    """And hold nobody up meanwhile."""
    port = http.base_url.port
    streams = [await anyio.connect_tcp("127.0.0.1", port or 80) for _ in range(100)]
    cut = 0

    async def trickle(stream: anyio.abc.SocketStream) -> None:
        nonlocal cut
        async with stream:
            try:
                await stream.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ")
                while True:
                    await stream.send(b"a")
                    await anyio.sleep(0.1)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                cut += 1

    with anyio.fail_after(HEAD + 15):
        async with anyio.create_task_group() as tasks:
            for stream in streams:
                tasks.start_soon(trickle, stream)
            for _ in range(5):
                assert (await http.get("/health", timeout=3)).status_code == 200
    assert cut == len(streams)


async def test_a_broken_way_to_a_box_that_runs_is_not_the_end(
    http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is told an end does not come back for the output; so it is told with the output, or not at all."""
    attach, breaks = LocalBox.attach, [True]

    async def breaking(self: LocalBox, *words: Any, **options: Any) -> LocalExecution:
        if breaks.pop() if breaks else False:
            raise UpstreamUnavailableError("the runner does not answer")
        return await attach(self, *words, **options)

    async def attached() -> tuple[bytes, list[int]]:
        output, exits = bytearray(), []
        with contextlib.suppress(ConnectionClosed):
            async with connect(f"{str(http.base_url).replace('http', 'ws')}{path}/attach") as socket:
                async for frame in socket:
                    if isinstance(frame, bytes):
                        output += frame[1:]
                    elif (told := json.loads(frame))["type"] == "exit":
                        exits.append(told["exit_code"])
        return bytes(output), exits

    path = await start(http, "sh", "-c", "echo all of it; exit 3")
    await ended(http, path)
    monkeypatch.setattr(LocalBox, "attach", breaking)
    with anyio.fail_after(20):
        assert await attached() == (b"", [])
        assert await attached() == (b"all of it\n", [3])
