"""Plain HTTP: envelopes, validation, keys, paths."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import time
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx2
import pytest

from hutch.errors import InvalidArgumentError, PermissionDeniedError
from hutch.sdk.remote import RemoteRuntime
from tests.server.conftest import IMAGE, KEY, READ_KEY, Served, make_home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.anyio]


def check_error(answer: httpx2.Response, status: int, code: str, *words: str) -> dict[str, Any]:
    """The answer is the envelope, with this status and code and these words in its message."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "code", "request_id"}
    error: dict[str, Any] = body["error"]
    assert error["code"] == code, error
    assert error["request_id"] == answer.headers["x-request-id"]
    for word in words:
        assert word in error["message"], error
    return error


def test_every_error_has_the_envelope(http: httpx2.Client) -> None:
    check_error(http.get("/nothing"), 404, "not_found", "/nothing")
    check_error(http.get("/v1/boxes/absent"), 404, "not_found", "absent")
    check_error(http.get("/v1/boxes/"), 404, "not_found")
    check_error(http.put("/v1/boxes"), 405, "invalid_argument", "PUT")
    check_error(http.post("/v1/boxes", content=b"{"), 400, "invalid_argument")
    check_error(http.post("/v1/boxes", json=[]), 400, "invalid_argument")
    large = json.dumps({"image": "x" * (2 << 20)}).encode()
    for body in (large, iter([large[:9], large[9:]])):  # the second one does not tell its length
        check_error(http.post("/v1/boxes", content=body), 413, "resource_exhausted")
    check_error(http.post("/v1/boxes/a%2Fb%00/start"), 404, "not_found")
    check_error(http.get("/v1/boxes/x/executions/y/attach"), 400, "invalid_argument", "WebSocket")
    check_error(http.delete("/v1/images/registries/x"), 404, "not_found")


def test_request_ids(http: httpx2.Client) -> None:
    assert http.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    first, second = (http.get("/health", headers={"X-Request-Id": "no good"}).headers["x-request-id"] for _ in "ab")
    assert first != second and "no good" not in (first, second)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cpus", 0),
        ("cpus", 33),
        ("cpus", "2"),
        ("cpus", 1.5),
        ("cpus", True),
        ("memory_mib", 127),
        ("memory_mib", 65537),
        ("disk_size_gb", 0),
        ("disk_size_gb", 1025),
        ("auto_stop", 59),
        ("auto_stop", -1),
        ("auto_delete", 1),
        ("name", ""),
        ("name", "-a"),
        ("name", "a/b"),
        ("name", "x" * 129),
        ("env", {"A": 1}),
        ("env", {"A=B": "x"}),
        ("env", ["A=1"]),
        ("cmd", "sh"),
        ("labels", {"hutch.server/auto-stop": "0"}),
        ("image", ""),
        ("working_dir", "relative"),
        ("auto_remove", True),
        ("security", "off"),
        ("network", {"mode": "maybe"}),
        ("network", {"mode": "enabled", "outbound": {"mode": "enabled"}}),
        ("network.allow_net.1", {"mode": "enabled", "allow_net": ["10.0.0.1", "a b"]}),
        ("network.outbound.allow_net", {"outbound": {"mode": "enabled", "allow_net": ["127.0.0.1:22"]}}),
        ("network.outbound.allow_net", {"outbound": {"mode": "disabled", "allow_net": ["10.0.0.1"]}}),
        ("network.inbound.allow_net", {"inbound": {"mode": "enabled", "allow_net": ["10.0.0.1"]}}),
        ("network.ports", {"ports": [80]}),
        ("ports", [80]),
        ("volumes", [{"host_path": "/etc/shadow-ish", "guest_path": "/x"}]),
        ("rootfs_path", "/etc/shadow-ish"),
        ("secrets.0.hosts", [{"name": "a", "value": "shadow"}]),
        ("secrets.0.value", [{"name": "a", "value": 5, "hosts": ["a.com"]}]),
        ("secret", [{"name": "a", "value": "shadow", "hosts": ["10.0.0.1"]}]),
        ("secrets", [{"name": "a", "value": "shadow", "hosts": ["host.hutch.internal"]}]),
        ("secret", [{"name": "a-b", "value": "shadow", "hosts": ["a.com"]}]),
        ("secret", [{"name": "a", "value": "shadow\r\nX: y", "hosts": ["a.com"]}]),
        ("placeholder", [{"name": "a", "value": "shadow", "hosts": ["a.com"], "placeholder": "short"}]),
        ("advanced", {"capabilities": {"add": ["ALL"]}}),
        ("tty", "yes"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_made(http: httpx2.Client, field: str, value: object) -> None:
    before = http.get("/v1/boxes").json()
    top = {"secret": "secrets", "placeholder": "secrets"}.get(field, field.partition(".")[0])
    answer = http.post("/v1/boxes", json={"image": IMAGE, top: value})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] in ("invalid_argument", "unsupported")
    assert field.replace("env", "environment" if value == {"A=B": "x"} else "env") in error["message"], error
    assert "shadow" not in error["message"]
    assert http.get("/v1/boxes").json() == before


def test_what_clients_always_send_is_taken(http: httpx2.Client) -> None:
    body = {"image": IMAGE, "network": {"mode": "enabled"}, "detach": False, "auto_stop": 0, "labels": {"a": "b"}}
    made = http.post("/v1/boxes", json=body)
    assert made.status_code == 201
    box = made.json()
    assert box["labels"] == {"a": "b"} and box["auto_stop"] == 0 and box["auto_delete"] == 0
    assert box["network"]["outbound"] == {"mode": "enabled", "allow_net": []}
    assert http.get("/v1/config").json()["capabilities"]["network_enabled"]
    assert http.head(f"/v1/boxes/{box['box_id']}").status_code == 204
    assert http.delete(f"/v1/boxes/{box['box_id']}").status_code == 204
    assert http.head(f"/v1/boxes/{box['box_id']}").status_code == 404


def test_paging_for_those_who_ask(http: httpx2.Client) -> None:
    made = {http.post("/v1/boxes", json={"image": IMAGE}).json()["box_id"] for _ in range(3)}
    everything = [box["box_id"] for box in http.get("/v1/boxes").json()["boxes"]]
    assert made <= set(everything)
    paged: list[str] = []
    token = None
    while True:
        params = {"pageSize": "2"} | ({"pageToken": token} if token else {})
        page = http.get("/v1/boxes", params=params).json()
        assert 1 <= len(page["boxes"]) <= 2
        paged += [box["box_id"] for box in page["boxes"]]
        if not (token := page["next_page_token"]):
            break
    assert paged == everything
    check_error(http.get("/v1/boxes", params={"pageSize": 0}), 400, "invalid_argument", "pageSize")
    check_error(http.get("/v1/boxes", params={"pageToken": "junk"}), 400, "invalid_argument", "pageToken")
    for box_id in made:
        http.delete(f"/v1/boxes/{box_id}")


def _identity(item: dict[str, Any]) -> str:
    return str(item.get("execution_id") or item.get("reference") or item["id"])


@pytest.mark.parametrize("names", [("pageSize", "pageToken"), ("page_size", "page_token")])
def test_every_list_has_pages(http: httpx2.Client, box: str, names: tuple[str, str]) -> None:
    size, token = names
    volumes = [http.post("/v1/volumes", json={}).json()["id"] for _ in range(3)]
    for name in "abc":
        assert http.post(f"/v1/boxes/{box}/snapshots", json={"name": name}).status_code == 201
        assert http.post(f"/v1/boxes/{box}/exec", json={"command": "true"}).status_code == 201
    for path, kind in (
        ("/v1/volumes", "volumes"),
        (f"/v1/boxes/{box}/snapshots", "snapshots"),
        (f"/v1/boxes/{box}/executions", "executions"),
        ("/v1/images", "images"),
        ("/v1/images/registries", "registries"),
    ):
        everything = http.get(path).json()
        assert everything["next_page_token"] is None
        wanted = list(map(_identity, everything[kind]))
        found: list[Any] = []
        after: dict[str, str] = {}
        while True:
            page = http.get(path, params={size: "1", **after}).json()
            found += page[kind]
            assert len(page[kind]) == min(1, len(wanted))
            if page["next_page_token"] is None:
                break
            after = {token: page["next_page_token"]}
        assert list(map(_identity, found)) == wanted
        check_error(http.get(path, params={size: "0"}), 400, "invalid_argument", size)
    for volume in volumes:
        assert http.delete(f"/v1/volumes/{volume}").status_code == 204


def test_a_slash_in_a_name_does_not_separate(http: httpx2.Client, box: str) -> None:
    name = quote("docker.io/library/busybox", safe="")
    assert http.get(f"/v1/images/{name}").json()["aliases"] == ["test"]
    check_error(http.get(f"/v1/images/{name}/aliases"), 405, "invalid_argument")
    check_error(http.delete(f"/v1/images/{name}/aliases/absent"), 404, "not_found", "absent")
    check_error(http.get(f"/v1/boxes/{box}/snapshots/{quote('a/b', safe='')}"), 404, "not_found", "a/b")


def test_an_exact_id_is_needed(http: httpx2.Client, box: str) -> None:
    check_error(http.get(f"/v1/boxes/{box[:6]}"), 404, "not_found")
    check_error(http.delete(f"/v1/boxes/{box[:6]}?force=true"), 404, "not_found")


def test_executions_over_http(http: httpx2.Client, box: str) -> None:
    base = f"/v1/boxes/{box}"
    started = http.post(f"{base}/exec", json={"command": "sleep", "args": ["60"]})
    assert started.status_code == 201
    one = f"{base}/executions/{started.json()['execution_id']}"
    seen = http.get(one).json()
    assert (seen["status"], seen["exit_code"], seen["command"], seen["attached"]) == (
        "running",
        None,
        "sleep 60",
        False,
    )
    assert [item["execution_id"] for item in http.get(f"{base}/executions").json()["executions"]] == [
        seen["execution_id"]
    ]
    check_error(http.post(f"{one}/signal", json={"signal": 9}), 400, "invalid_argument", "DELETE")
    check_error(http.post(f"{one}/resize", json={"rows": 0, "cols": 1}), 400, "invalid_argument", "rows")
    check_error(http.post(f"{one}/resize", json={"rows": 1, "cols": 1}), 400, "invalid_argument", "terminal")
    assert http.delete(one).status_code == 204
    seen = http.get(one).json()
    assert (seen["status"], seen["exit_code"]) == ("killed", -9)
    assert http.delete(one).status_code == 204
    check_error(http.post(f"{one}/signal", json={"signal": 15}), 409, "invalid_state")
    check_error(http.get(f"{base}/executions/absent"), 404, "not_found")
    check_error(http.post(f"{base}/exec", json={"command": "absent"}), 422, "execution_failed", "absent")
    check_error(http.post(f"{base}/exec", json={"command": ""}), 400, "invalid_argument", "command")
    check_error(http.post(f"{base}/exec", json={"command": "true", "timeout_seconds": -1}), 400, "invalid_argument")
    check_error(http.post(f"{base}/exec", json={"command": "true", "stdin": 1}), 400, "invalid_argument", "stdin")
    late = http.post(f"{base}/exec", json={"command": "sleep", "args": ["60"], "timeout_seconds": 0.2}).json()
    with httpx2.Client(base_url=str(http.base_url), timeout=10) as other:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            seen = other.get(f"{base}/executions/{late['execution_id']}").json()
            if seen["status"] != "running":
                break
    assert (seen["status"], seen["exit_code"]) == ("timed_out", -15)
    other_box = http.post("/v1/boxes", json={"image": IMAGE}).json()["box_id"]
    check_error(http.get(f"/v1/boxes/{other_box}/executions/{late['execution_id']}"), 404, "not_found")
    http.delete(f"/v1/boxes/{other_box}")


def test_a_stopped_box_is_not_started_by_an_exec_unless_it_says_so(http: httpx2.Client) -> None:
    for body, status in (({}, 409), ({"auto_resume": True}, 201), ({"auto_resume": False}, 409)):
        box = http.post("/v1/boxes", json={"image": IMAGE, **body}).json()["box_id"]
        assert http.post(f"/v1/boxes/{box}/exec", json={"command": "true"}).status_code == 201
        assert http.post(f"/v1/boxes/{box}/stop", json={"timeout_seconds": 0}).json()["status"] == "stopped"
        assert http.post(f"/v1/boxes/{box}/stop").status_code == 200
        answer = http.post(f"/v1/boxes/{box}/exec", json={"command": "true"})
        assert answer.status_code == status, answer.text
        if status == 409:
            check_error(answer, 409, "stopped")
        http.delete(f"/v1/boxes/{box}?force=true")


def test_files_of_every_kind(http: httpx2.Client, box: str) -> None:
    path = f"/v1/boxes/{box}/files"
    check_error(http.get(path, params={"path": "/absent"}), 404, "not_found", "/absent")
    check_error(http.get(path), 400, "invalid_argument", "path")
    check_error(http.get(path, params={"path": ""}), 400, "invalid_argument", "path")
    for is_dir in ("true", "false"):
        junk = http.put(path, params={"path": "/x", "source_is_dir": is_dir}, content=b"junk" * 300)
        check_error(junk, 400, "invalid_argument")
    assert http.get(path, params={"path": "/etc"}).headers["x-boxlite-source-is-dir"] == "true"
    one = http.get(path, params={"path": "/etc/passwd"})
    assert one.headers["x-boxlite-source-is-dir"] == "false" and one.headers["content-type"] == "application/x-tar"
    put = http.put(path, params={"path": "/new/name", "source_is_dir": "false"}, content=one.content)
    assert put.status_code == 204, put.text
    again = http.get(path, params={"path": "/new/name"})
    assert b"root:x:0:0" in again.content
    two = http.get(path, params={"path": "/etc"}).content
    check_error(http.put(path, params={"path": "/y", "source_is_dir": "false"}, content=two), 400, "invalid_argument")


def test_discovery(http: httpx2.Client) -> None:
    config = http.get("/v1/config").json()
    assert config["capabilities"]["snapshots_enabled"] is True
    assert config["capabilities"]["linux_capabilities_enabled"] is False
    assert http.get("/v1/me").json()["path_prefix"] is None
    assert http.get("/docs").status_code == 200
    paths = http.get("/openapi.json").json()["paths"]
    assert "/v1/boxes/{box_id}/exec" in paths and "/v1/images/{name}/aliases/{alias}" in paths


def test_without_a_key_only_this_machine_is_answered(http: httpx2.Client) -> None:
    check_error(http.get("/v1/boxes", headers={"Host": "evil.example"}), 403, "permission_denied")
    check_error(http.get("/v1/boxes", headers={"Origin": "http://evil.example"}), 403, "permission_denied")
    own = str(http.base_url).rstrip("/")
    assert http.get("/v1/boxes", headers={"Origin": own}).status_code == 200


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Served]:
    home = make_home(tmp_path_factory.mktemp("guarded"), images)
    options = ("--read-only-key", READ_KEY, "--path-prefix", "us/team-1")
    server = Served(home, *options, env={"HUTCH_API_KEY": KEY})
    yield server
    assert server.stop() == 0


def test_keys_and_prefix(guarded: Served) -> None:
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(httpx2.Client(base_url=guarded.url, headers={"Authorization": value} if value else {}))
            for value in ("", f"Bearer {KEY}", f"Bearer {READ_KEY}", "Bearer wrong", f"Basic {KEY}", "Bearer")
        ]
        nobody, full, reader, *wrong = clients
        base = "/v1/us/team-1"
        for client in (nobody, *wrong):
            answer = client.get(f"{base}/boxes")
            check_error(answer, 401, "unauthenticated")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert client.get("/v1/config").status_code == 200
            assert client.get("/health").status_code == 200
            check_error(client.get("/v1/me"), 401, "unauthenticated")
        assert full.get(f"{base}/boxes", headers={"Host": "any.example"}).status_code == 200
        check_error(full.get("/v1/boxes"), 404, "not_found", base)
        assert full.get("/v1/me").json() == {
            "sub": "key:all",
            "principal_type": "service_account",
            "scopes": ["read", "write"],
            "path_prefix": "us/team-1",
        }
        assert reader.get(f"{base}/boxes").status_code == 200
        assert reader.get("/v1/me").json()["scopes"] == ["read"]
        check_error(reader.post(f"{base}/boxes", json={"image": IMAGE}), 403, "permission_denied")
        box = full.post(f"{base}/boxes", json={"image": IMAGE}).json()["box_id"]
        check_error(reader.delete(f"{base}/boxes/{box}"), 403, "permission_denied")
        check_error(reader.post(f"{base}/x/boxes/{box}/exec", json={}), 403, "permission_denied")
        check_error(reader.post(f"{base}/images/registries", json={}), 403, "permission_denied")
        assert reader.get(f"{base}/x/boxes/{box}").json()["id"] == box
        check_error(full.get(f"/v1/x/boxes/{box}"), 404, "not_found", base)
        assert full.delete(f"{base}/boxes/{box}").status_code == 204


async def test_a_key_that_may_only_read_watches(guarded: Served) -> None:
    async with (
        RemoteRuntime(guarded.url, KEY, path_prefix="us/team-1") as full,
        RemoteRuntime(guarded.url, READ_KEY, path_prefix="/us/team-1/") as reader,
    ):
        assert (await reader.whoami()).scopes == ("read",)
        box = await full.create(IMAGE, auto_remove=True)
        execution = await box.exec("sh", "-c", "echo out; read x; echo $x; exit 3", stdin=True)
        seen = await (await reader.get(box.id)).attach(execution.id)
        with pytest.raises(PermissionDeniedError):
            await (await reader.get(box.id)).run("true")
        with pytest.raises(PermissionDeniedError):
            await reader.create(IMAGE)
        await execution.stdin.write(b"in\n")
        result = await seen.wait()
        assert (result.stdout, result.exit_code) == (b"out\nin\n", 3)


def test_the_operator_says_what_isolation_is_offered(tmp_path: Path, images: Path) -> None:
    server = Served(make_home(tmp_path, images), "--isolation", "container")
    with httpx2.Client(base_url=server.url, timeout=30) as http:
        assert http.get("/v1/config").json()["isolations"] == ["container"]
        for body in ({}, {"isolation": "container"}):
            box = http.post("/v1/boxes", json={"image": IMAGE, **body}).json()
            assert box["isolation"] == "container"
            http.delete(f"/v1/boxes/{box['box_id']}")
        for asked in ("vm", "auto"):
            answer = http.post("/v1/boxes", json={"image": IMAGE, "isolation": asked})
            check_error(answer, 400, "unsupported", "isolation", "container")
        answer = http.post("/v1/boxes", json={"image": IMAGE, "isolation": "none"})
        check_error(answer, 400, "invalid_argument", "isolation")
        answer = http.post("/v1/x/boxes", json={"spec": {"image": IMAGE, "isolation": "vm"}})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported"
        made = http.post("/v1/x/boxes", json={"spec": {"image": IMAGE}}).json()
        assert made["isolation"] == "container"
        assert http.delete(f"/v1/x/boxes/{made['id']}").status_code == 200
        assert http.get("/v1/boxes").json()["boxes"] == []
    assert server.stop() == 0


def test_a_head_that_is_too_large_ends_the_connection(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with contextlib.suppress(OSError):
            for _ in range(200):
                sock.sendall(b"X-A: " + b"a" * 1000 + b"\r\n")
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                answer += piece
    assert answer == b"" or (answer.startswith(b"HTTP/1.1 400") and b'"invalid_argument"' in answer)
    assert httpx2.get(f"{served.url}/health").status_code == 200


def test_more_connections_than_the_server_takes(tmp_path: Path, images: Path) -> None:
    server = Served(make_home(tmp_path, images), "--max-connections", "4")
    with httpx2.Client(base_url=server.url) as http, contextlib.ExitStack() as idle:
        box = http.post("/v1/boxes", json={"image": IMAGE}).json()["box_id"]
        assert http.post(f"/v1/boxes/{box}/exec", json={"command": "true"}).status_code == 201
        for _ in range(3):
            idle.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
        with httpx2.Client(base_url=server.url) as other:
            refused = other.get("/v1/boxes")
            check_error(refused, 429, "resource_exhausted", "connections")
            assert refused.headers["retry-after"] == "1"
            upgrade = {
                "Connection": "Upgrade",
                "Upgrade": "websocket",
                "Sec-WebSocket-Version": "13",
                "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
            }
            check_error(other.get(f"/v1/boxes/{box}/attach", headers=upgrade), 429, "resource_exhausted")
        assert http.get("/health").status_code == 200, "who is there already goes on"
        idle.close()
        assert http.delete(f"/v1/boxes/{box}", params={"force": "true"}).status_code == 204
    assert server.stop() == 0


def test_a_repeated_request_is_carried_out_once(http: httpx2.Client) -> None:
    key = {"Idempotency-Key": uuid.uuid4().hex}
    body = {"image": IMAGE, "name": "once"}
    first, again = (http.post("/v1/boxes", json=body, headers=key) for _ in range(2))
    assert first.status_code == again.status_code == 201 and first.json() == again.json()
    assert first.headers["x-request-id"] != again.headers["x-request-id"]
    check_error(http.post("/v1/boxes", json={"image": IMAGE}, headers=key), 422, "invalid_argument", "Idempotency-Key")
    check_error(http.post("/v1/boxes", json=body), 409, "already_exists")
    check_error(http.post("/v1/boxes", json=body, headers={"Idempotency-Key": "a b"}), 400, "invalid_argument")
    box = f"/v1/boxes/{first.json()['box_id']}"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        script = {"command": "sh", "args": ["-c", "echo >> /root/count"]}
        key = {"Idempotency-Key": uuid.uuid4().hex}
        answers = list(pool.map(lambda _: http.post(f"{box}/exec", json=script, headers=key).json(), range(8)))
    assert len({answer["execution_id"] for answer in answers}) == 1
    key = {"Idempotency-Key": uuid.uuid4().hex}
    codes = [http.delete(box, params={"force": "true"}, headers=key).status_code for _ in range(2)]
    assert codes == [204, 204]
    check_error(http.delete(box), 404, "not_found")


def test_a_request_that_is_none_gets_the_envelope(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as sock:
        sock.sendall(b"NONSENSE\r\n\r\n")
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == "invalid_argument"


async def test_the_operators_time_limits_hold_for_every_client(tmp_path: Path, images: Path) -> None:
    options = ("--exec-timeout", "500ms", "--max-exec-timeout", "2", "--max-transfer", "1g")
    server = Served(make_home(tmp_path, images), *options)
    async with RemoteRuntime(server.url) as runtime:
        box = await runtime.create(IMAGE, auto_remove=True)
        for timeout in (None, 0.4):
            result = await box.run("sleep", "60", timeout=timeout)
            assert (result.timed_out, result.exit_code) == (True, -15)
        for timeout in (0, 2.5):
            with pytest.raises(InvalidArgumentError, match="limit of 2 seconds"):
                await box.run("true", timeout=timeout)
        await box.files.write("/f", b"x")  # a transfer is no command
        with httpx2.Client(base_url=server.url, timeout=30) as http:
            path = f"/v1/boxes/{box.id}/exec"
            check_error(
                http.post(path, json={"command": "true", "timeout_seconds": 0}),
                400,
                "invalid_argument",
                "timeout_seconds",
            )
            assert http.get("/v1/config").json()["limits"]["exec_timeout_max_seconds"] == 2
            assert http.get("/v1/config").json()["limits"]["file_transfer_max_bytes"] == 1 << 30
    assert server.stop() == 0
    assert not list((server.home / "server").glob("transit-*"))
