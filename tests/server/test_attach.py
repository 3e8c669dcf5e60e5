"""The WebSocket of an execution, frame by frame."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from hutch.runtime.runtime import LocalRuntime
from tests.server.conftest import IMAGE, Served

if TYPE_CHECKING:
    import httpx2
    from websockets.asyncio.client import ClientConnection

pytestmark = [pytest.mark.root, pytest.mark.anyio]


def start(http: httpx2.Client, box: str, script: str, **options: Any) -> str:
    body = {"command": "sh", "args": ["-c", script], **options}
    answer = http.post(f"/v1/boxes/{box}/exec", json=body)
    assert answer.status_code == 201, answer.text
    execution_id: str = answer.json()["execution_id"]
    return execution_id


def attach(served: Served, box: str, execution: str, query: str = "") -> connect:
    url = f"{served.url.replace('http', 'ws')}/v1/boxes/{box}/executions/{execution}/attach{query}"
    return connect(url, compression=None, max_size=None)


async def frames(socket: ClientConnection) -> list[bytes | str]:
    """All frames up to the close."""
    found: list[bytes | str] = []
    try:
        with anyio.fail_after(20):
            while True:
                found.append(await socket.recv())
    except ConnectionClosed:
        return found


def output(found: list[bytes | str], channel: int) -> bytes:
    return b"".join(frame[1:] for frame in found if isinstance(frame, bytes) and frame[:1] == bytes((channel,)))


async def until(seconds: float, condition: Any) -> None:
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.02)


async def test_greeting_first_exit_last_and_an_orderly_close(served: Served, http: httpx2.Client, box: str) -> None:
    execution = start(http, box, "echo out; echo err >&2; exit 3")
    async with attach(served, box, execution) as socket:
        assert socket.response is not None and socket.response.headers["x-boxlite-execution-id"] == execution
        found = await frames(socket)
        assert socket.close_code == 1000
    assert found[0] == b""
    assert json.loads(found[-1]) == {"type": "exit", "exit_code": 3}
    assert (output(found, 1), output(found, 2)) == (b"out\n", b"err\n")
    seen = http.get(f"/v1/boxes/{box}/executions/{execution}").json()
    assert (seen["status"], seen["exit_code"], seen["attached"]) == ("completed", 3, False)


async def test_a_silent_command_is_greeted_at_once(served: Served, http: httpx2.Client, box: str) -> None:
    execution = start(http, box, "sleep 60")
    async with attach(served, box, execution) as socket:
        with anyio.fail_after(2):
            assert await socket.recv() == b""
        http.delete(f"/v1/boxes/{box}/executions/{execution}")
        assert json.loads((await frames(socket))[-1])["exit_code"] == -9


async def test_frames_end_between_characters(served: Served, http: httpx2.Client, box: str) -> None:
    text = "€😀ä" * 40_000
    script = "i=0; while [ $i -lt 40 ]; do printf '€😀ä%.0s' $(seq 1000); i=$((i+1)); done; printf '\\303'"
    execution = start(http, box, script)
    async with attach(served, box, execution) as socket:
        found = await frames(socket)
    pieces = [frame[1:] for frame in found if isinstance(frame, bytes) and frame[:1] == b"\1"]
    assert pieces[-1] == b"\303"
    assert "".join(piece.decode() for piece in pieces[:-1]) == text


async def test_one_client_at_a_time_and_the_place_is_free_afterwards(
    served: Served, http: httpx2.Client, box: str
) -> None:
    execution = start(http, box, "echo a; read x; echo $x")
    async with attach(served, box, execution) as first:
        await first.recv()
        with pytest.raises(InvalidStatus) as refused:
            await attach(served, box, execution).__aenter__()
        assert refused.value.response.status_code == 409
        body = json.loads(refused.value.response.body or b"")
        assert body["error"]["code"] == "already_exists"
        assert await first.recv() == b"\1a\n"
    url = f"/v1/boxes/{box}/executions/{execution}"
    await until(5, lambda: not http.get(url).json()["attached"])
    async with attach(served, box, execution) as second:
        await second.send(b"b\n")
        found = await frames(second)
    assert output(found, 1) == b"a\nb\n"


async def test_what_does_not_exist_is_refused_before_the_upgrade(served: Served, http: httpx2.Client, box: str) -> None:
    for path, status, code in (
        (f"/v1/boxes/{box}/executions/absent/attach", 404, "not_found"),
        ("/v1/boxes/absent/executions/x/attach", 404, "not_found"),
        (f"/v1/boxes/{box}/attach", 404, "not_found"),
        ("/v1/unknown", 404, "not_found"),
    ):
        with pytest.raises(InvalidStatus) as refused:
            await connect(served.url.replace("http", "ws") + path).__aenter__()
        response = refused.value.response
        assert (response.status_code, json.loads(response.body or b"")["error"]["code"]) == (status, code), path


async def test_text_frames(served: Served, http: httpx2.Client, box: str) -> None:
    script = "trap 'echo usr1' USR1; echo ready; while read x; do [ $x = size ] && stty size; done; echo end"
    execution = start(http, box, script, tty=True, rows=10, cols=20)
    async with attach(served, box, execution) as socket:

        async def until_seen(words: bytes) -> None:
            seen = b""
            with anyio.fail_after(10):
                while words not in seen:
                    frame = await socket.recv()
                    seen += frame[1:] if isinstance(frame, bytes) else frame.encode()

        await until_seen(b"ready")
        await socket.send(b"size\n")
        await until_seen(b"10 20")
        await socket.send(json.dumps({"type": "resize", "rows": 33, "cols": 44}))
        await anyio.sleep(0.1)
        await socket.send(b"size\n")
        await until_seen(b"33 44")
        for wrong, words in (
            ({"type": "signal", "sig": 9}, b"not allowed"),
            ({"type": "resize", "rows": 0, "cols": 1}, b"terminal"),
            ({"type": "other"}, b"unknown"),
            ([1], b"not understood"),
        ):
            await socket.send(json.dumps(wrong))
            await until_seen(words)
        await socket.send(json.dumps({"type": "signal", "sig": 10}))
        await until_seen(b"usr1")
        await socket.send(json.dumps({"type": "stdin_eof"}))
        found = await frames(socket)
    assert json.loads(found[-1])["type"] == "exit"


async def test_a_client_that_only_reads(served: Served, http: httpx2.Client, box: str) -> None:
    execution = start(http, box, "read x; echo got $x")
    async with attach(served, box, execution, "?stdin=0") as socket:
        await socket.send(json.dumps({"type": "stdin_eof"}))
        await socket.send(b"mine\n")
        found = await frames(socket)
        assert socket.close_code == 1008
    assert "only reads" in str(found[-1])
    async with attach(served, box, execution) as socket:
        await socket.send(b"yours\n")
        assert output(await frames(socket), 1) == b"got yours\n"


async def test_output_that_was_not_received_is_owed(served: Served, http: httpx2.Client, box: str) -> None:
    """The client reads nothing and goes; the command has ended. Until it comes back, or has had its time, the
    execution counts as running."""
    execution = start(http, box, "seq 1 200000 | head -c 400000; exit 9")
    url = f"/v1/boxes/{box}/executions/{execution}"
    socket = await attach(served, box, execution)
    socket.transport.pause_reading()
    await anyio.sleep(0.5)
    assert http.get(url).json()["status"] == "running"
    socket.transport.abort()
    await until(5, lambda: not http.get(url).json()["attached"])
    assert http.get(url).json()["status"] == "running"
    async with attach(served, box, execution) as again:
        found = await frames(again)
    expected = "".join(f"{n}\n" for n in range(1, 80_000)).encode()[:400_000]
    assert output(found, 1) == expected
    assert json.loads(found[-1])["exit_code"] == 9
    assert http.get(url).json()["status"] == "completed"


async def test_a_client_that_is_slower_than_the_command_gets_all(served: Served, http: httpx2.Client, box: str) -> None:
    execution = start(http, box, "seq 1 1000000 | head -c 6000000")
    total = 0
    async with attach(served, box, execution) as socket:
        with anyio.fail_after(30):
            while True:
                frame = await socket.recv()
                if isinstance(frame, str):
                    break
                total += max(0, len(frame) - 1)
                await anyio.sleep(0.01)
    assert total == 6_000_000 and json.loads(frame)["exit_code"] == 0


async def test_input_that_waits_does_not_stop_signals_or_output(served: Served, http: httpx2.Client, box: str) -> None:
    execution = start(http, box, "trap 'echo usr1; exit 0' USR1; echo ready; while :; do sleep 0.05; done")
    async with attach(served, box, execution) as socket:
        await socket.recv()
        assert await socket.recv() == b"\1ready\n"
        for _ in range(8):  # nobody reads it: more than the command, the agent and its connection hold
            await socket.send(b"x" * 1_000_000)
        await socket.send(json.dumps({"type": "signal", "sig": 10}))
        found = await frames(socket)
    assert output(found, 1) == b"usr1\n" and json.loads(found[-1])["exit_code"] == 0


async def test_stopping_the_box_ends_the_execution(served: Served, http: httpx2.Client, box: str) -> None:
    execution, unwatched = start(http, box, "sleep 60"), start(http, box, "sleep 60")
    async with attach(served, box, execution) as socket:
        await socket.recv()
        begin = time.monotonic()
        assert http.post(f"/v1/boxes/{box}/stop", json={"timeout_seconds": 1}).status_code == 200
        found = await frames(socket)
    assert json.loads(found[-1])["exit_code"] < 0 and time.monotonic() - begin < 10
    for one in (execution, unwatched):
        assert http.get(f"/v1/boxes/{box}/executions/{one}").json()["status"] == "killed"


async def test_a_main_command_may_be_attached_before_it_starts(served: Served, http: httpx2.Client) -> None:
    box = http.post("/v1/boxes", json={"image": IMAGE, "cmd": ["sh", "-c", "echo main; exit 2"]}).json()["box_id"]
    async with connect(f"{served.url.replace('http', 'ws')}/v1/boxes/{box}/attach") as socket:
        assert socket.response is not None and socket.response.headers["x-boxlite-execution-id"] == "main"
        assert await socket.recv() == b""
        assert http.post(f"/v1/boxes/{box}/start").status_code == 200
        found = await frames(socket)
    assert output(found, 1) == b"main\n" and json.loads(found[-1])["exit_code"] == 2
    await until(5, lambda: http.get(f"/v1/boxes/{box}").json()["status"] == "stopped")
    seen = http.get(f"/v1/boxes/{box}/executions/main").json()
    assert (seen["status"], seen["exit_code"]) == ("completed", 2)
    http.delete(f"/v1/boxes/{box}")


async def test_an_execution_that_another_process_started(served: Served, http: httpx2.Client, box: str) -> None:
    async with LocalRuntime(served.home) as runtime:
        other = await runtime.get(box)
        execution = await other.exec("sh", "-c", "echo from elsewhere; read x; exit 8", stdin=True)
        async with attach(served, box, execution.id) as socket:
            await socket.send(b"\n")
            found = await frames(socket)
        await execution.close()
    assert output(found, 1) == b"from elsewhere\n" and json.loads(found[-1])["exit_code"] == 8


async def test_removing_the_box_ends_the_execution(served: Served, http: httpx2.Client) -> None:
    box = http.post("/v1/boxes", json={"image": IMAGE}).json()["box_id"]
    execution = start(http, box, "echo up; sleep 60")
    async with attach(served, box, execution) as socket:
        assert await socket.recv() == b""
        assert await socket.recv() == b"\1up\n"
        answer = await anyio.to_thread.run_sync(lambda: http.delete(f"/v1/boxes/{box}?force=true"))
        assert answer.status_code == 204
        found = await frames(socket)
    assert json.loads(found[-1])["exit_code"] < 0


async def test_hundreds_of_clients_of_one_box(served: Served, http: httpx2.Client, box: str) -> None:
    """More than the agent takes connections at once, and more questions than it would answer at once."""
    count = 150
    ids = [start(http, box, f"echo {number}; exit {number}") for number in range(count)]
    outcomes: dict[int, tuple[bytes, int]] = {}

    async def watch(number: int) -> None:
        async with attach(served, box, ids[number]) as socket:
            found = await frames(socket)
        outcomes[number] = output(found, 1), json.loads(found[-1])["exit_code"]

    async with anyio.create_task_group() as tasks:
        for number in range(count):
            tasks.start_soon(watch, number)
    assert outcomes == {number: (f"{number}\n".encode(), number) for number in range(count)}
