"""The network of boxes over REST: what operators allow, tunnels as connections see them, and where secrets are not."""

from __future__ import annotations

import contextlib
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
import httpx2
import pytest

from hutch.runtime.runtime import LocalRuntime
from hutch.server.app import make_app
from hutch.server.settings import ServerSettings
from hutch.types import NetPolicy, Outbound
from tests.leaks import holders, searched
from tests.server.cases import LISTENING
from tests.server.conftest import IMAGE, KEY, READ_KEY, Served, empty, make_home
from tests.server.test_http import check_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.anyio]

VALUE = "tr3asure-40c2a9"
HELLO = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nhello\n"
# At 8080 bytes come back, at 8081 there is a web server.
SERVE = f"nc -ll -p 8080 -e cat & while :; do printf '{HELLO}' | nc -l -p 8081 >/last; done"


@contextlib.contextmanager
def serving(home: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """A server, ended in order; nothing of its boxes is left."""
    server = Served(home, *options, env=env)
    try:
        yield server
    finally:
        code = server.stop()
        with ThreadPoolExecutor(1) as pool:  # there may be an event loop here
            pool.submit(empty, home).result()
    assert code == 0 and "Traceback" not in server.errors, server.errors


def client(server: Served, key: str | None = None) -> httpx2.Client:
    """A client with a key."""
    return httpx2.Client(
        base_url=server.url, timeout=30, headers={"Authorization": f"Bearer {key}"} if key else {}, trust_env=False
    )


def create(http: httpx2.Client, **fields: Any) -> httpx2.Response:
    """Ask for a box."""
    return http.post("/v1/boxes", json={"image": IMAGE, **fields})


def outbound(answer: httpx2.Response) -> tuple[str, list[str]]:
    """Whom the box that an answer is about may reach."""
    assert answer.status_code in (200, 201), answer.text
    rule = answer.json()["network"]["outbound"]
    return rule["mode"], rule["allow_net"]


# What operators allow.


def test_an_operator_gives_a_list_at_most(tmp_path: Path, images: Path) -> None:
    most = ["*.example.com:443", "10.1.0.0/16"]
    options = [word for rule in most for word in ("--allow-net", rule)]
    with serving(make_home(tmp_path, images), *options) as server, client(server) as http:
        assert http.get("/v1/config").json()["capabilities"]["network_enabled"]
        assert outbound(create(http)) == ("disabled", [])
        assert outbound(create(http, network={"mode": "enabled"})) == ("enabled", most)
        allowed = ["a.b.example.com:443", "10.1.2.0/24:80"]
        box = create(http, network={"mode": "enabled", "allow_net": allowed})
        assert outbound(box) == ("enabled", allowed)
        before = http.get("/v1/boxes").json()
        for beyond in ("a.example.com", "a.example.com:80-443", "example.com:443", "10.0.0.0/8", "10.2.0.1", "*"):
            answer = create(http, network={"mode": "enabled", "allow_net": ["10.1.0.1", beyond]})
            check_error(answer, 400, "unsupported", "network.allow_net", f"'{beyond}'", most[0])
        answer = create(http, network={"outbound": {"mode": "enabled"}})
        check_error(answer, 400, "unsupported", "network.outbound.mode", most[0])
        secret = {"name": "A", "value": VALUE, "hosts": ["other.test"]}
        check_error(create(http, secrets=[secret]), 400, "unsupported", "secrets", "other.test")
        path = f"/v1/boxes/{box.json()['box_id']}/network/outbound"
        check_error(http.put(path, json={"mode": "enabled"}), 400, "unsupported", "mode")
        check_error(
            http.put(path, json={"mode": "enabled", "allow_net": ["10.2.0.1"]}), 400, "unsupported", "allow_net"
        )
        spec = {"image": IMAGE, "network": {"outbound": "enabled"}}
        check_error(http.post("/v1/x/boxes", json={"spec": spec}), 400, "unsupported", "network")
        assert http.get("/v1/boxes").json() == before
        assert create(http, secrets=[{**secret, "hosts": ["api.example.com"]}]).status_code == 201


@contextlib.asynccontextmanager
async def here(home: Path, **options: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A server in this very process."""
    async with LocalRuntime(home) as runtime:
        app = make_app(runtime, ServerSettings(state=home / "server", **options))
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http,
        ):
            yield http
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)


async def test_an_operator_gives_no_network(tmp_path: Path, images: Path) -> None:
    async with here(make_home(tmp_path, images), network=NetPolicy()) as http:
        capabilities = (await http.get("/v1/config")).json()["capabilities"]
        assert not capabilities["network_enabled"] and not capabilities["secrets_enabled"]
        assert capabilities["tunnels_enabled"]
        made = await http.post("/v1/boxes", json={"image": IMAGE, "network": {"mode": "enabled"}})
        assert outbound(made) == ("disabled", [])
        rules = {"mode": "enabled", "allow_net": ["10.1.0.1"]}
        answer = await http.post("/v1/boxes", json={"image": IMAGE, "network": rules})
        check_error(answer, 400, "unsupported", "network.allow_net")
        secret = {"name": "A", "value": VALUE, "hosts": ["a.com"]}
        for wish in ({"network": {"outbound": "enabled"}}, {"secrets": [secret]}):
            answer = await http.post("/v1/x/boxes", json={"spec": {"image": IMAGE, **wish}})
            check_error(answer, 400, "unsupported", "network")
        path = f"/v1/x/boxes/{made.json()['box_id']}/network"
        check_error(await http.post(path, json={"outbound": "enabled"}), 400, "unsupported", "network")
        assert len((await http.get("/v1/boxes")).json()["boxes"]) == 1


async def test_the_machine_of_the_server_can_be_named_if_the_operator_does(tmp_path: Path, images: Path) -> None:
    rule = "host.hutch.internal:5432"
    most = NetPolicy(outbound=Outbound.ENABLED, allow=(rule,))
    async with here(make_home(tmp_path, images), network=most, network_by_default=False) as http:

        async def made(network: dict[str, Any]) -> httpx2.Response:
            return await http.post("/v1/boxes", json={"image": IMAGE, "network": network})

        assert outbound(await made({"mode": "enabled"})) == ("disabled", [])
        assert outbound(await made({"outbound": {"mode": "enabled"}})) == ("enabled", [])
        assert outbound(await made({"mode": "enabled", "allow_net": [rule, "a.com"]})) == ("enabled", [rule, "a.com"])
        for other in ("host.hutch.internal", "127.0.0.1:5432", "169.254.169.254", "::1"):
            check_error(await made({"mode": "enabled", "allow_net": [other]}), 400, "unsupported", other)
        spec = {"image": IMAGE, "network": {"outbound": "enabled", "allow": [rule]}}
        box = (await http.post("/v1/x/boxes", json={"spec": spec})).json()
        assert box["network"]["allow"] == [rule]
        body = {"outbound": "enabled", "allow": ["127.0.0.1"]}
        check_error(await http.post(f"/v1/x/boxes/{box['id']}/network", json=body), 400, "unsupported", "127.0.0.1")


async def test_without_nft_the_server_says_that_there_is_no_network(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An explicit wish for one is an error that says what to do."""
    monkeypatch.setattr("hutch.host.netns._PATH", "/nowhere")
    async with here(make_home(tmp_path, images)) as http:
        capabilities = (await http.get("/v1/config")).json()["capabilities"]
        assert not capabilities["network_enabled"] and not capabilities["secrets_enabled"]
        made = await http.post("/v1/boxes", json={"image": IMAGE, "network": {"mode": "enabled"}})
        assert outbound(made) == ("disabled", [])
        path = f"/v1/boxes/{made.json()['box_id']}"
        assert (await http.post(f"{path}/start")).status_code == 200
        secret = {"name": "A", "value": VALUE, "hosts": ["a.com"]}
        for wish in (
            {"network": {"mode": "enabled", "allow_net": ["10.1.0.1"]}},
            {"network": {"outbound": {"mode": "enabled"}}},
            {"secrets": [secret]},
            {"network": {"mode": "enabled"}, "secrets": [secret]},
        ):
            answer = await http.post("/v1/boxes", json={"image": IMAGE, **wish})
            check_error(answer, 503, "network_unavailable", "nftables")
        answer = await http.put(f"{path}/network/outbound", json={"mode": "enabled"})
        check_error(answer, 503, "network_unavailable", "nftables")
        assert len((await http.get("/v1/boxes")).json()["boxes"]) == 1
        assert (await http.put(f"{path}/network/outbound", json={"mode": "disabled"})).status_code == 204


# Tunnels.


@pytest.fixture
def listening(http: httpx2.Client, box: str) -> str:
    """The id of a box that listens at 8080 and 8081."""
    for command in (SERVE, LISTENING):
        started = http.post(f"/v1/boxes/{box}/exec", json={"command": "sh", "args": ["-c", command]})
        assert started.status_code == 201
    path = f"/v1/boxes/{box}/executions/{started.json()['execution_id']}"
    for _attempt in range(500):
        status = http.get(path).json()
        if status["status"] != "running":
            assert status["exit_code"] == 0
            return box
    pytest.fail("nobody listens in the box")


def tunnel(http: httpx2.Client, box: str, port: int = 8080) -> str:
    """The authority of a tunnel."""
    answer = http.post(f"/v1/boxes/{box}/network/tunnel", params={"port": port})
    assert answer.status_code == 200, answer.text
    uri: str = answer.json()["uri"]
    return urlsplit(uri).netloc


def talk(address: tuple[str, int], data: bytes, source: str = "127.0.0.1") -> bytes:
    """Connect, send, say that this is all, and return what comes."""
    with socket.create_connection(address, timeout=10, source_address=(source, 0)) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
        return answer


def at(authority: str) -> tuple[str, int]:
    """The address of a tunnel that has a port of its own."""
    host, _, port = authority.rpartition(":")
    return host, int(port)


def asks(target: str, host: str | None = None) -> bytes:
    """The head of a CONNECT."""
    return f"CONNECT {target} HTTP/1.1\r\nHost: {host or target}\r\n\r\n".encode()


def test_a_tunnel_is_a_stream_of_bytes(http: httpx2.Client, listening: str) -> None:
    authority = tunnel(http, listening)
    assert tunnel(http, listening) == authority, "asked for again it is the same"
    answer = talk(at(authority), asks(authority) + b"at once")
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and rest == b"at once"
    (one,) = http.get(f"/v1/boxes/{listening}/network/tunnel").json()["tunnels"]
    assert one["port"] == 8080 and "uri" not in one
    refused = talk(at(tunnel(http, listening, 99)), asks("x:1"))
    assert refused.startswith(b"HTTP/1.1 503 ") and refused.endswith(b"Connection refused")


def test_an_ordinary_request_is_passed_on(http: httpx2.Client, listening: str) -> None:
    authority = tunnel(http, listening, 8081)
    assert httpx2.get(f"http://{authority}/a?b=c", timeout=10).text == "hello\n"
    for host in ("evil.example", f"evil.example:{at(authority)[1]}"):
        answer = talk(at(authority), f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 403 "), "another site's page may not get through by a name"


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"CONNECT x:1\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: [\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: \r\n\r\n",
        b"X" * 40_000,
    ],
)
def test_what_is_no_request_is_refused(http: httpx2.Client, listening: str, head: bytes) -> None:
    answer = talk(at(tunnel(http, listening)), head)
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_a_tunnel_is_for_the_address_that_asked_for_it(http: httpx2.Client, listening: str) -> None:
    authority = tunnel(http, listening)
    path = f"/v1/boxes/{listening}/network/inbound"

    def stranger() -> bytes:
        return talk(at(authority), asks(authority) + b"x", source="127.0.0.2")

    assert stranger().startswith(b"HTTP/1.1 403 ")
    assert http.put(path, json={"mode": "enabled"}).status_code == 204
    assert http.get(f"/v1/boxes/{listening}").json()["network"]["inbound"]["mode"] == "enabled"
    assert stranger().endswith(b"\r\n\r\nx")
    assert http.put(path, json={"mode": "disabled"}).status_code == 204
    assert stranger().startswith(b"HTTP/1.1 403 ")


def test_a_revoked_tunnel_ends(http: httpx2.Client, listening: str) -> None:
    authority, other = tunnel(http, listening), tunnel(http, listening, 8081)
    path = f"/v1/boxes/{listening}/network/tunnel"
    with socket.create_connection(at(authority), timeout=10) as sock:
        sock.sendall(asks(authority) + b"x")
        while not (answer := sock.recv(4096)).endswith(b"x"):
            assert answer
        assert [each["connections"] for each in http.get(path).json()["tunnels"]] == [1, 0]
        assert http.delete(path, params={"port": 8080}).status_code == 204
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(at(authority), timeout=10)
    assert httpx2.get(f"http://{other}/", timeout=10).text == "hello\n"
    assert http.delete(path, params={"port": 8080}).status_code == 204
    for port in ("0", "65536", "x", None):
        check_error(http.delete(path, params={"port": port} if port else {}), 400, "invalid_argument", "port")
        check_error(http.post(path, params={"port": port} if port else {}), 400, "invalid_argument", "port")


def test_a_tunnel_is_for_one_life_of_the_box(http: httpx2.Client, listening: str) -> None:
    authority = tunnel(http, listening)
    path = f"/v1/boxes/{listening}"
    assert http.post(f"{path}/stop", json={"timeout_seconds": 0}).status_code == 200
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(at(authority), timeout=10)
    check_error(http.post(f"{path}/network/tunnel", params={"port": 8080}), 409, "stopped", "does not run")
    assert http.post(f"{path}/start").status_code == 200
    authority = tunnel(http, listening)
    # By another way, of which the server learns only when it looks.
    assert http.post(f"/v1/x/boxes/{listening}/stop", json={"timeout": 0}).status_code == 200
    assert http.post(f"/v1/x/boxes/{listening}/start", json={}).status_code == 200
    with contextlib.suppress(ConnectionRefusedError):
        assert talk(at(authority), asks(authority)).startswith(b"HTTP/1.1 404 ")
    check_error(http.post("/v1/boxes/none/network/tunnel", params={"port": 1}), 404, "not_found")


def test_with_a_url_tunnels_have_names_that_nobody_can_guess(tmp_path: Path, images: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    options = ("--api-key", KEY, "--read-only-key", READ_KEY, "--tunnel-url", "https://tunnels.example")
    with (
        serving(make_home(tmp_path, images), *options, "--tunnel-port", str(port)) as server,
        client(server, KEY) as http,
        client(server, READ_KEY) as reader,
    ):
        box = create(http).json()["box_id"]
        assert http.post(f"/v1/boxes/{box}/start").status_code == 200
        path = f"/v1/boxes/{box}/network/tunnel"
        check_error(reader.post(path, params={"port": 8080}), 403, "permission_denied")
        name = tunnel(http, box)
        assert re.fullmatch(r"[0-9a-f]{32}\.tunnels\.example", name)
        listed = reader.get(path)
        assert listed.status_code == 200 and name not in listed.text
        check_error(reader.delete(path, params={"port": 8080}), 403, "permission_denied")
        check_error(reader.put(f"/v1/boxes/{box}/network/inbound", json={"mode": "enabled"}), 403, "permission_denied")
        command = ["-ll", "-p", "8080", "-e", "cat"]
        assert http.post(f"/v1/boxes/{box}/exec", json={"command": "nc", "args": command}).status_code == 201
        address = ("127.0.0.1", port)
        for _attempt in range(100):
            answer = talk(address, asks(f"{name}:443") + b"x", source="127.0.0.2")
            if answer.startswith(b"HTTP/1.1 200"):
                break
        assert answer.endswith(b"\r\n\r\nx")
        for wrong in ("0" * 32 + ".tunnels.example", "tunnels.example:443", name.partition(".")[0]):
            assert talk(address, asks(wrong)).startswith(b"HTTP/1.1 404 ")
        assert talk(address, asks("other:1", host=name)).startswith(b"HTTP/1.1 404 "), "the target counts"
        assert http.delete(path, params={"port": 8080}).status_code == 204
        assert talk(address, asks(f"{name}:443")).startswith(b"HTTP/1.1 404 ")
        assert tunnel(http, box) != name


# Secrets.


async def test_values_of_secrets_are_in_no_answer_log_or_record(tmp_path: Path, images: Path) -> None:
    """Whether a request succeeds or fails. The control is the value's placeholder, which the box has."""
    home = make_home(tmp_path, images)
    answers = []
    with serving(home, env={"HUTCH_DEBUG": "1"}) as server, client(server) as http:
        secret = {"name": "API_KEY", "value": VALUE, "hosts": ["a.com"]}
        made = create(http, secrets=[secret])
        path = f"/v1/boxes/{made.json()['box_id']}"
        environment = {"command": "sh", "args": ["-c", 'test "$API_KEY" = "<BOXLITE_SECRET:API_KEY>"']}
        answers += [made, http.post(f"{path}/start"), http.post(f"{path}/exec", json=environment)]
        wrong: list[dict[str, Any]] = [
            {**secret, "value": [VALUE]},
            {**secret, "value": VALUE + "\n"},
            {**secret, "hosts": []},
            {**secret, "hosts": ["127.0.0.1"]},
        ]
        answers.append(create(http, secrets=[{**secret, "more": 1}]))
        for each in wrong:
            answers.append(create(http, secrets=[each]))
            spec = {"image": IMAGE, "secrets": [each]}
            answers.append(http.post("/v1/x/boxes", json={"spec": spec}))
            assert {answer.status_code for answer in answers[-2:]} == {400}, [answer.text for answer in answers[-2:]]
        answers.append(create(http, secrets=[secret, secret]))
        answers.append(create(http, image="127.0.0.1:1/absent", secrets=[secret]))
        answers.append(http.post("/v1/boxes", content=b'{"image": "x", "secrets": [{"value": "' + VALUE.encode()))
        key = {"Idempotency-Key": "secret-once"}
        for _ in range(2):
            answers.append(http.post("/v1/boxes", json={"image": IMAGE, "secrets": [secret]}, headers=key))
        assert answers[-1].json() == answers[-2].json()
        answers += [http.get(path), http.get("/v1/boxes"), http.get(f"/v1/x{path[3:]}"), http.get("/openapi.json")]
        with anyio.fail_after(20):
            while http.get(f"{path}/executions").json()["executions"][-1]["status"] == "running":
                await anyio.sleep(0.02)
        assert http.get(f"{path}/executions").json()["executions"][-1]["exit_code"] == 0, "the control"
        assert http.post(f"{path}/stop", json={"timeout_seconds": 0}).status_code == 200
        answers += [http.post(f"{path}/clone", json={}), http.post(f"{path}/export", json={})]
        for answer in answers:
            assert VALUE.encode() not in answer.content, answer.request.url
        with anyio.fail_after(10):
            while any((home / "server").glob("transit-*")):  # the export goes once it was sent
                await anyio.sleep(0.02)
        assert {home / "hutch.db", home / "server" / "server.db"} <= set(searched(home))
        assert holders(VALUE, home) == []
    assert VALUE not in server.errors
