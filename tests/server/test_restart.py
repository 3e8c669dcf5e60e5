"""The life of the server itself: start, end, sudden death."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import httpx2
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from hutch.runtime.runtime import LocalRuntime
from hutch.server import keeper
from hutch.server.app import make_app
from hutch.server.settings import ServerSettings
from tests.server.conftest import IMAGE, Served, empty, make_home

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fastapi import FastAPI

    from hutch.server.service import Service

pytestmark = [pytest.mark.root, pytest.mark.anyio]


def test_without_a_key_only_loopback_is_bound(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hutch", "--home", str(tmp_path / "h"), "serve", "--host", "0.0.0.0", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=20,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2 and "--api-key" in done.stderr


def test_an_address_that_is_taken(served: Served) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hutch", "--home", str(served.home), "serve", "--port", str(served.port)],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1 and str(served.port) in done.stderr and "Traceback" not in done.stderr


def test_two_servers_do_not_share_a_home(served: Served) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hutch", "--home", str(served.home), "serve", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode != 0 and "another server" in done.stderr, done.stderr


async def test_sudden_death_loses_nothing(tmp_path: Path, images: Path) -> None:
    """The command goes on, can be attached to by its id, and has lost no byte."""
    home = make_home(tmp_path, images)
    begin = time.monotonic()
    server = Served(home)
    with httpx2.Client(base_url=server.url) as http:
        assert http.get("/health").status_code == 200
        assert time.monotonic() - begin < 5  # alone on a machine it is far below two seconds
        assert (home / "server").stat().st_mode & 0o777 == 0o700
        assert (home / "server/server.db").stat().st_mode & 0o777 == 0o600
        box = http.post("/v1/boxes", json={"image": IMAGE, "auto_stop": 3600}).json()["box_id"]
        script = "for i in $(seq 1 2000); do echo $i; done; read x; echo $x; exit 7"
        body = {"command": "sh", "args": ["-c", script]}
        execution = http.post(f"/v1/boxes/{box}/exec", json=body).json()["execution_id"]
    url = f"{server.url.replace('http', 'ws')}/v1/boxes/{box}/executions/{execution}/attach"
    socket = await connect(url)
    assert await socket.recv() == b""
    server.stop(signal.SIGKILL)
    socket.transport.abort()
    server.start(server.port)
    try:
        with httpx2.Client(base_url=server.url) as http:
            info = http.get(f"/v1/boxes/{box}").json()
            assert (info["status"], info["auto_stop"]) == ("running", 3600)
            seen = http.get(f"/v1/boxes/{box}/executions/{execution}").json()
            assert seen["status"] == "running"
        data = b""
        async with connect(url) as socket:
            await socket.send(b"end\n")
            with anyio.fail_after(20):
                try:
                    while True:
                        frame = await socket.recv()
                        data += frame[1:] if isinstance(frame, bytes) else b""
                except ConnectionClosed:
                    pass
        assert data == "".join(f"{n}\n" for n in range(1, 2001)).encode() + b"end\n"
        assert isinstance(frame, str) and json.loads(frame)["exit_code"] == 7
    finally:
        assert await anyio.to_thread.run_sync(server.stop) == 0
        await anyio.to_thread.run_sync(empty, home)


async def test_an_orderly_end_leaves_boxes_and_commands_alone(tmp_path: Path, images: Path) -> None:
    home = make_home(tmp_path, images)
    server = Served(home)
    with httpx2.Client(base_url=server.url) as http:
        box = http.post("/v1/boxes", json={"image": IMAGE}).json()["box_id"]
        started = http.post(f"/v1/boxes/{box}/exec", json={"command": "sleep", "args": ["60"]}).json()
    url = f"{server.url.replace('http', 'ws')}/v1/boxes/{box}/executions/{started['execution_id']}/attach"
    async with connect(url) as socket:
        assert await socket.recv() == b""
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with anyio.fail_after(10), pytest.raises(ConnectionClosed):
            await socket.recv()
    assert await anyio.to_thread.run_sync(server.stop) == 0
    assert time.monotonic() - begin < 10
    assert "Traceback" not in server.errors
    async with LocalRuntime(home) as runtime:
        other = await runtime.get(box)
        assert [info.state.value for info in await other.executions()] == ["running"]
        await other.remove(force=True)


@pytest.fixture
async def app(tmp_path: Path, images: Path) -> AsyncIterator[FastAPI]:
    """A server's application, in this process."""
    home = make_home(tmp_path, images)
    settings = ServerSettings(state=home / "server", sweep_seconds=3600)
    async with LocalRuntime(home) as runtime:
        app = make_app(runtime, settings)
        async with app.router.lifespan_context(app):
            yield app
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)


async def test_idle_boxes_are_stopped_resumed_and_removed(app: FastAPI) -> None:
    service: Service = app.state.service
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
        body = {"image": IMAGE, "auto_stop": 60, "auto_delete": 120}
        box = (await http.post("/v1/boxes", json=body)).json()["box_id"]
        stubborn = (await http.post("/v1/boxes", json={**body, "auto_resume": False})).json()["box_id"]
        for one in (box, stubborn):
            assert (await http.post(f"/v1/boxes/{one}/start")).status_code == 200

        async def idle(seconds: float) -> None:
            for one in (box, stubborn):
                if (mark := service.marks.get(one)) is not None:
                    mark.at -= seconds
            await keeper.sweep(service)

        async def status(one: str) -> str:
            answer = await http.get(f"/v1/boxes/{one}")
            return str(answer.json()["status"]) if answer.status_code == 200 else "absent"

        await idle(30)
        assert await status(box) == "running"
        await idle(31)  # looking is no use
        assert (await status(box), await status(stubborn)) == ("stopped", "stopped")

        async def run(one: str, *words: str) -> httpx2.Response:
            return await http.post(f"/v1/boxes/{one}/exec", json={"command": words[0], "args": [*words[1:]]})

        assert (await run(stubborn, "true")).json()["error"]["code"] == "stopped"
        assert (await run(box, "sleep", "60")).status_code == 201
        await idle(61)
        assert await status(box) == "running", "a command that runs is work, even if nobody watches"
        executions = (await http.get(f"/v1/boxes/{box}/executions")).json()["executions"]
        path = f"/v1/boxes/{box}/executions/{executions[-1]['execution_id']}"
        await http.delete(path)
        with anyio.fail_after(10):
            while (await http.get(path)).json()["status"] == "running":
                await anyio.sleep(0.02)
        await idle(61)
        assert await status(box) == "stopped"
        await http.post(f"/v1/boxes/{box}/start")
        await http.post(f"/v1/boxes/{box}/stop")
        assert (await run(box, "true")).json()["error"]["code"] == "stopped", "a stop on request is another thing"
        await idle(121)
        assert (await status(box), await status(stubborn)) == ("absent", "absent")
        assert service.marks.boxes() == []


async def test_what_our_own_client_does_is_activity(app: FastAPI) -> None:
    """Commands and what is typed keep a box alive, looking does not; the operator's idle time holds for its boxes."""
    service: Service = app.state.service
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:

        async def post(path: str, **body: object) -> httpx2.Response:
            return await http.post(f"/v1/x/boxes{path}", json=body)

        made = (await post("", spec={"image": IMAGE, "labels": {"a": "b"}})).json()
        box, base = made["id"], f"/{made['id']}"
        assert made["labels"] == (await http.get(f"/v1/x/boxes/{box}")).json()["labels"] == {"a": "b"}
        assert (await http.get(f"/v1/boxes/{box}")).json()["auto_stop"] == service.settings.auto_stop == 900
        assert (await post("", spec={"image": IMAGE, "labels": {"hutch.server/auto-stop": "0"}})).status_code == 400

        async def idle(seconds: float) -> str:
            if (mark := service.marks.get(box)) is not None:
                mark.at -= seconds
            await keeper.sweep(service)
            return str((await http.get(f"/v1/x/boxes/{box}")).json()["state"])

        async def run(exec_id: str, *command: str) -> httpx2.Response:
            return await post(f"{base}/exec", id=exec_id, command=command)

        assert (await post(f"{base}/start")).status_code == 200
        assert await idle(600) == "running"
        assert (await run("a" * 12, "true")).status_code == 200
        assert await idle(600) == "running"
        for path in ("", "/stats", "/executions", "/log", "/snapshots"):
            assert (await http.get(f"/v1/x/boxes/{box}{path}")).status_code == 200
        assert await idle(301) == "stopped"
        assert (await run("b" * 12, "true")).status_code == 200, "the next use starts it again"
        assert await idle(901) == "stopped"
        # Started and stopped on request: that is another thing than the stop of the idle policy.
        assert (await post(f"{base}/start")).status_code == 200
        assert (await post(f"{base}/stop")).status_code == 200
        refused = await run("c" * 12, "true")
        assert refused.json()["error"]["code"] == "stopped"
        assert refused.json()["error"]["request_id"] == refused.headers["x-request-id"]
