"""--network, --allow-net, --secret, -p; net show, set, log; port-forward."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from hutch.cli import options
from tests.cli.conftest import KEY
from tests.remote.processes import Process, free_ports

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Tool

pytestmark = pytest.mark.root


def test_a_box_has_no_network_unless_asked(hutch: Tool) -> None:
    hutch("create", "--name", "box", "busybox")
    assert hutch.text("net", "show", "box") == "outbound: disabled"
    assert hutch.json("net", "show", "box", "--json") == {
        "outbound": "disabled",
        "allow": [],
        "ports": [],
        "send_rate": None,
        "receive_rate": None,
    }


@pytest.mark.here
def test_options_become_a_policy(hutch: Tool) -> None:
    hutch("create", "--name", "list", "--allow-net", "example.com:443", "--allow-net", "10.0.0.0/8", "busybox")
    assert hutch.text("net", "show", "list").splitlines() == [
        "outbound: allow-list",
        "allow: example.com:443",
        "allow: 10.0.0.0/8",
    ]
    hutch("create", "--name", "all", "--network", "enabled", "-p", "127.0.0.1:8080:80", "-p", "81", "busybox")
    assert hutch.text("net", "show", "all").splitlines() == [
        "outbound: enabled",
        "port: 127.0.0.1:8080 -> 80",
        "port: 127.0.0.1:any -> 81",
    ]
    hutch("net", "set", "all", "--allow-net", "*.example.com")
    assert hutch.json("net", "show", "all", "--json")["allow"] == ["*.example.com"]
    hutch("net", "set", "all", "--network", "disabled")
    assert hutch.json("net", "show", "all", "--json")["outbound"] == "disabled"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--network", "maybe"), "none of enabled, disabled"),
        (("--network", "disabled", "--allow-net", "a.com"), "--allow-net: has no meaning"),
        (("-p", "0"), "is not [[ADDRESS:]HOST_PORT:]PORT"),
        (("-p", "1:2:3:4"), "is not [[ADDRESS:]HOST_PORT:]PORT"),
        (("--secret", "KEY=value"), "a secret is NAME=VALUE@HOST"),
        (("--secret", "HUTCH_UNSET@a.com"), "HUTCH_UNSET is not set"),
    ],
)
def test_usage_errors(hutch: Tool, words: tuple[str, ...], message: str) -> None:
    done = hutch("create", *words, "busybox", code=2)
    assert message in done.stderr.decode()
    assert not hutch.boxes()


def test_a_malformed_rule_is_an_error_before_anything_is_made(hutch: Tool) -> None:
    done = hutch("create", "--allow-net", "a b", "busybox", code=1)
    assert b"'a b' is not a rule for a network" in done.stderr
    assert not hutch.boxes()
    done = hutch("net", "set", "nothing", code=2)
    assert b"nothing to change" in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80", (80, 0, "127.0.0.1")),
        ("8080:80", (80, 8080, "127.0.0.1")),
        (":80", (80, 0, "127.0.0.1")),
        ("0.0.0.0:8080:80", (80, 8080, "0.0.0.0")),
        ("[::1]:8080:80", (80, 8080, "::1")),
        ("8080:80/tcp", (80, 8080, "127.0.0.1")),
    ],
)
def test_published_ports(text: str, expected: tuple[int, int, str]) -> None:
    assert options.publish(text) == options.PublishOption(*expected)
    assert options.publish("5353:53/udp") == options.PublishOption(53, 5353, "127.0.0.1", "udp")


def test_limits(hutch: Tool) -> None:
    hutch("create", "--name", "box", "--network", "enabled", "--send-rate", "500k", "busybox")
    assert hutch.text("net", "show", "box").splitlines() == ["outbound: enabled", "send rate: 500 KiB/s"]
    hutch("net", "set", "box", "--receive-rate", "2m")
    hutch("net", "set", "box", "--allow-net", "example.com")  # leaves the rates alone
    policy = hutch.json("net", "show", "box", "--json")
    assert (policy["send_rate"], policy["receive_rate"]) == (500 << 10, 2 << 20)
    hutch("net", "set", "box", "--send-rate", "none")
    policy = hutch.json("net", "show", "box", "--json")
    assert (policy["send_rate"], policy["receive_rate"], policy["allow"]) == (None, 2 << 20, ["example.com"])
    assert b"is not a size" in hutch("net", "set", "box", "--send-rate", "fast", code=2).stderr
    assert b"send_rate" in hutch("net", "set", "box", "--send-rate", "1", code=1).stderr


def test_secrets_are_not_shown(hutch: Tool) -> None:
    assert options.secret("KEY=a@b=c@x.com,y.com") == ("KEY", "a@b=c", ("x.com", "y.com"))
    hutch("create", "--name", "box", "--secret", "KEY@example.com", "busybox", KEY="trove-7")
    shown = hutch.text("inspect", "box")
    assert "trove-7" not in shown and json.loads(shown)[0]["secrets"][0]["hosts"] == ["example.com"]
    assert hutch.text("exec", "box", "sh", "-c", "echo $KEY") == "<HUTCH_SECRET:KEY>"


def test_what_was_refused_is_told(hutch: Tool) -> None:
    hutch("create", "--name", "box", "--allow-net", "192.0.2.99", "busybox")
    hutch("exec", "box", "sh", "-c", "echo x | nc -w 5 198.51.100.9 80", code=None)
    (line,) = hutch.text("net", "log", "box").splitlines()
    assert line.endswith("tcp 198.51.100.9:80: the policy has no rule for the address")
    (entry,) = hutch.json("net", "log", "box", "--json")
    assert entry["peer"] == "198.51.100.9:80"


def test_a_port_is_forwarded_until_a_signal(hutch: Tool, read_line: Any, finish: Any) -> None:
    hutch("create", "--name", "box", "busybox")
    hutch("exec", "-d", "box", "nc", "-ll", "-p", "8080", "-e", "cat")
    process = hutch.popen("port-forward", "box", "8080")
    address, arrow, port = read_line(process).decode().split()
    assert (arrow, port) == ("->", "8080")
    host, _, number = address.rpartition(":")
    for _ in range(50):
        with socket.create_connection((host, int(number)), timeout=10) as connection:
            connection.sendall(b"hello")
            try:
                if connection.recv(5) == b"hello":
                    break
            except ConnectionResetError:  # nc does not listen yet
                continue
    else:
        pytest.fail("nothing came back")
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


@pytest.mark.there
def test_ports_at_a_server_are_refused_and_nothing_is_made(hutch: Tool) -> None:
    assert (
        b"its operator has to allow that, with --publish-address"
        in hutch("create", "--name", "no", "-p", "80", "busybox", code=1).stderr
    )
    assert hutch.text("ls", "-q") == ""
    hutch("create", "--name", "list", "--allow-net", "example.com:443", "busybox")
    assert hutch.text("net", "show", "list").splitlines() == ["outbound: allow-list", "allow: example.com:443"]
    hutch("net", "set", "list", "--network", "enabled")
    assert hutch.text("net", "show", "list") == "outbound: enabled"
    done = hutch("net", "set", "list", "--allow-net", "host.hutch.internal:22", code=1)
    assert b"lets no box reach 'host.hutch.internal:22'" in done.stderr


@pytest.mark.there
def test_ports_at_a_server_that_gives_some(hutch: Tool, image_home: Path, tmp_path: Path) -> None:
    """What they are is shown, and there they answer."""
    home = tmp_path / "publishing"
    subprocess.run(["cp", "-a", image_home, home], check=True)
    first = free_ports(10)
    options = ("--publish-address", "127.0.0.3", "--publish-ports", f"{first}-{first + 9}", "--max-receive-rate", "5m")
    with Process("-m", "hutch", "--home", home, "serve", "--port", "{port}", "--api-key", KEY, *options) as server:
        there = ("--url", server.url)
        done = hutch(*there, "run", "-d", "-p", "8080:80", "busybox", "true", code=1)
        assert f"this server gives ports from {first} to {first + 9}, not 8080" in done.stderr.decode()
        serve = "nc -ll -p 80 -e cat"
        hutch(*there, "run", "-d", "--name", "web", "-p", f"{first}:80", "-p", "53/udp", "busybox", "sh", "-c", serve)
        lines = hutch.text(*there, "net", "show", "web").splitlines()
        assert lines[:3] == ["outbound: disabled", "receive rate: 5.0 MiB/s", f"port: 127.0.0.3:{first} -> 80"]
        assert re.fullmatch(r"port: 127\.0\.0\.3:2\d{4} -> 53/udp", lines[3])
        ports = json.loads(hutch.text(*there, "inspect", "web"))[0]["network"]["ports"]
        assert {(port["host_ip"], port["protocol"]) for port in ports} == {("127.0.0.3", "tcp"), ("127.0.0.3", "udp")}
        for _ in range(50):
            with (
                contextlib.suppress(ConnectionResetError),  # nc does not listen yet
                socket.create_connection(("127.0.0.3", first), timeout=10) as connection,
            ):
                connection.sendall(b"hello")
                if connection.recv(5) == b"hello":
                    break
        else:
            pytest.fail("nothing came back")
        done = hutch(*there, "run", "-d", "-p", f"{first}:80", "busybox", "true", code=1)
        assert f"tcp port {first} is taken at this server" in done.stderr.decode()
        hutch(*there, "rm", "--all", "--force")


@pytest.mark.here
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--network", "disabled", "--allow-net", "a.com"), "--allow-net: has no meaning"),
        (("--allow-net", "a b"), "'a b' is not a rule for a network"),
        (("--publish-ports", "80"), "'80' is not a range of ports"),
        (("--publish-ports", "80-90"), "a range lies within 1024-65535"),
        (("--max-send-rate", "fast"), "is not a size"),
        (("--tunnel-port", "80"), "has no meaning without --tunnel-url"),
        (("--tunnel-url", "ftp://a.com"), "is no URL for tunnels"),
        (("--tunnel-url", "https://a.com:99999"), "--tunnel-url: Port out of range"),
    ],
)
def test_what_a_server_cannot_be_told_of_networks(hutch: Tool, words: tuple[str, ...], message: str) -> None:
    assert message in hutch("serve", "--port", "0", *words, code=None).stderr.decode()
