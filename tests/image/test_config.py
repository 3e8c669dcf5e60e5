"""Settings and logins."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.errors import ConfigError
from hutch.image import Credential, RegistryConfig
from hutch.image.auth import Challenge, parse_challenges
from hutch.image.config import is_loopback

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:5000",
        "LOCALHOST.",
        "a.localhost",
        "127.0.0.1",
        "127.8.9.1:80",
        "127.1",
        "0x7f000001",
        "0.0.0.0:80",
        "::1",
        "[::1]",
        "[::1]:5000",
        "[::ffff:127.0.0.1]:80",
    ],
)
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["example.org", "localhost.example.org", "127.0.0.1.nip.example", "10.0.0.1:5000", "[fe80::1]", "", "notlocalhost"],
)
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_secrets_are_not_shown() -> None:
    config = RegistryConfig(credentials={"h": Credential("ann", "secret-word")})
    assert "secret-word" not in f"{config!r} {config} {config.credentials} {config.credential('h')}"
    assert "ann" in repr(config)


def login(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_docker_logins(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    auths = {
        "https://index.docker.io/v1/": login("hub", "a:b"),
        "host:5000": login("h", "p"),
        "https://other.example/v2/": login("o", "q"),
        "empty.example": {},
        "named.example": {"username": "n", "password": "r"},
    }
    path.write_text(json.dumps({"auths": auths, "credsStore": "x"}))
    config = RegistryConfig(docker_config=path, credentials={"host:5000": Credential("mine", "x")})
    assert config.credential("docker.io") == Credential("hub", "a:b")
    assert config.credential("host:5000") == Credential("mine", "x")
    assert config.credential("other.example") == Credential("o", "q")
    assert config.credential("named.example") == Credential("n", "r")
    for host in ("empty.example", "host:5001", "index.docker.io.evil.example", "example", ""):
        assert config.credential(host) is None
    assert RegistryConfig(docker_config=tmp_path / "none").credential("host:5000") is None


@pytest.mark.parametrize(
    "text", ["{", '{"auths": []}', '{"auths": {"h": {"auth": "!!"}}}', '{"auths": {"h": {"auth": "c2VjcmV0"}}}']
)
def test_damaged_docker_logins(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        RegistryConfig(docker_config=path).credential("h")
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "challenges"),
    [
        ("", []),
        ("Basic", [Challenge("basic", {})]),
        ('Basic realm="a b"', [Challenge("basic", {"realm": "a b"})]),
        (
            'Bearer realm="https://a/t",service=s, scope="repository:x:pull,push"',
            [Challenge("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:x:pull,push"})],
        ),
        (
            'Negotiate, Basic realm="q\\"q", Bearer REALM="r"',
            [Challenge("negotiate", {}), Challenge("basic", {"realm": 'q"q'}), Challenge("bearer", {"realm": "r"})],
        ),
    ],
)
def test_challenges(header: str, challenges: list[Challenge]) -> None:
    assert parse_challenges(header) == challenges


@given(st.text(max_size=200))
def test_any_challenge_is_survived(header: str) -> None:
    parse_challenges(header)
