"""Published ports over REST, as any client sees them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.remote.processes import free_ports
from tests.server.conftest import IMAGE, make_home
from tests.server.test_boxlite import SCRIPT
from tests.server.test_http import check_error
from tests.server.test_network import client, create, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import httpx2

    from tests.server.conftest import Served

pytestmark = pytest.mark.root

FIRST = free_ports(10)
LAST = FIRST + 9
ADDRESS = "127.0.0.2"
MOST = 4


@pytest.fixture(scope="module")
def publishing(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Served]:
    """A server that publishes ports."""
    options = ["--publish-address", ADDRESS, "--publish-ports", f"{FIRST}-{LAST}", "--max-published", str(MOST)]
    with serving(make_home(tmp_path_factory.mktemp("publishing"), images), *options) as server:
        yield server


@pytest.fixture
def http(publishing: Served) -> Iterator[httpx2.Client]:
    """A client of that server, whose boxes go afterwards."""
    with client(publishing) as http:
        yield http
        for box in http.get("/v1/boxes").json()["boxes"]:
            http.delete(f"/v1/boxes/{box['box_id']}", params={"force": "true"})


def ports(*wanted: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The fields of a box that has no network but these ports."""
    return {"network": {"outbound": {"mode": "disabled"}, "published_ports": list(wanted)}, **more}


def answered(port: dict[str, Any]) -> bytes:
    """What comes back from a published port when its box has had the time to listen."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((port["host_ip"], port["host_port"]), timeout=10) as connection,
        ):
            connection.sendall(b"hello")
            if data := connection.recv(5):
                return data
    return b""


def test_a_port_is_published(http: httpx2.Client) -> None:
    wish = ports({"guest_port": 8080}, {"guest_port": 53, "host_port": FIRST, "protocol": "udp"})
    made = create(http, **wish, cmd=["nc", "-ll", "-p", "8080", "-e", "cat"])
    assert made.status_code == 201, made.text
    udp = {"guest_port": 53, "host_ip": ADDRESS, "host_port": FIRST, "protocol": "udp"}
    before = {"guest_port": 8080, "host_ip": ADDRESS, "host_port": 0, "protocol": "tcp"}
    assert made.json()["network"]["published_ports"] == [before, udp]
    box = made.json()["box_id"]
    started = http.post(f"/v1/boxes/{box}/start").json()["network"]["published_ports"]
    assert started[1] == udp and FIRST < started[0]["host_port"] <= LAST
    assert answered(started[0]) == b"hello"
    assert http.get(f"/v1/boxes/{box}").json()["network"]["published_ports"] == started
    assert http.get(f"/v1/boxes/{box}/metrics").json()["network_bytes_sent"] >= 5
    assert http.post(f"/v1/boxes/{box}/stop").json()["network"]["published_ports"] == [before, udp]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((ADDRESS, started[0]["host_port"]), timeout=5)


def test_who_asks_for_ports_alone_gets_no_network(http: httpx2.Client) -> None:
    made = create(http, network={"published_ports": [{"guest_port": 80}]})
    assert made.json()["network"]["outbound"] == {"mode": "disabled", "allow_net": []}
    both = create(http, network={"mode": "enabled", "published_ports": [{"guest_port": 80}]}).json()["network"]
    assert both["outbound"]["mode"] == "enabled" and len(both["published_ports"]) == 1


def test_the_published_client_is_told(http: httpx2.Client, publishing: Served) -> None:
    wish = ports({"guest_port": 8080}, {"guest_port": 53, "protocol": "udp"})
    box = create(http, **wish, cmd=["nc", "-ll", "-p", "8080", "-e", "cat"]).json()["box_id"]
    started = http.post(f"/v1/boxes/{box}/start").json()["network"]["published_ports"]
    assert answered(started[0]) == b"hello"
    words = [sys.executable, SCRIPT, "published_ports", publishing.url]
    done = subprocess.run(words, capture_output=True, text=True, timeout=55)
    assert done.stdout == "passed\n", done.stderr[-4000:]


def test_refusals_say_what_there_is(http: httpx2.Client, publishing: Served) -> None:
    for port in (80, FIRST - 1, LAST + 1, publishing.port):
        answer = create(http, **ports({"guest_port": 80, "host_port": port}))
        check_error(answer, 400, "unsupported", "ports", f"from {FIRST} to {LAST}, not {port}")
    for bad, named in (
        ({"guest_port": 0}, "guest_port"),
        ({"guest_port": 80, "host_port": 65536}, "host_port"),
        ({"guest_port": 80, "protocol": "sctp"}, "protocol"),
        ({"guest_port": 80, "host_ip": "0.0.0.0"}, "host_ip"),
        ({"guest_port": "80"}, "guest_port"),
    ):
        check_error(create(http, **ports(bad)), 400, "invalid_argument", named)
    twice = {"guest_port": 80, "host_port": FIRST}
    check_error(create(http, **ports(twice, twice)), 400, "invalid_argument", f"port {FIRST} is asked for twice")
    check_error(create(http, **ports(*[{"guest_port": 80}] * (MOST + 1))), 429, "resource_exhausted", f"most {MOST}")
    spec = {"image": IMAGE, "network": {"ports": [{"port": 80, "host_ip": "0.0.0.0"}]}}
    check_error(http.post("/v1/x/boxes", json={"spec": spec}), 400, "unsupported", "not at 0.0.0.0")
    assert http.get("/v1/boxes").json()["boxes"] == []


def test_one_of_many_gets_a_port(http: httpx2.Client) -> None:
    """The others get a conflict."""
    with ThreadPoolExecutor(8) as pool:
        wish = ports({"guest_port": 80, "host_port": FIRST + 1})
        answers = list(pool.map(lambda number: create(http, **wish, name=f"racer-{number}"), range(8)))
    (won,) = [answer for answer in answers if answer.status_code == 201]
    for answer in answers:
        if answer is not won:
            check_error(answer, 409, "already_exists", f"tcp port {FIRST + 1} is taken")
            assert "racer" not in answer.text and won.json()["box_id"] not in answer.text


def test_without_the_operators_word_there_are_none(tmp_path: Path, images: Path) -> None:
    with serving(make_home(tmp_path, images)) as server, client(server) as http:
        answer = create(http, **ports({"guest_port": 80}))
        check_error(answer, 400, "unsupported", "ports", "--publish-address")
        assert http.get("/v1/boxes").json()["boxes"] == []
