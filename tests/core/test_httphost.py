"""Whom a request is for."""

from __future__ import annotations

import h11
import pytest

from hutch.core import httphost


def _request(target: str, *hosts: str, method: str = "GET") -> h11.Request:
    headers = [("Host", host) for host in hosts]
    return h11.Request(method=method, target=target, headers=headers, http_version="1.0" if len(hosts) != 1 else "1.1")


@pytest.mark.parametrize(
    ("target", "host", "expected"),
    [
        ("/", "Example.COM", ("example.com", None)),
        ("/", "example.com.:8080", ("example.com", 8080)),
        ("*", "example.com", ("example.com", None)),
        ("/", "[::1]:80", ("::1", 80)),
        ("/", "1.2.3.4", ("1.2.3.4", None)),
        ("http://EXAMPLE.com:80/x", "example.com:80", ("example.com", 80)),
        ("//other.example/", "example.com", ("example.com", None)),
    ],
)
def test_hosts(target: str, host: str, expected: tuple[str, int | None]) -> None:
    assert httphost.host(_request(target, host)) == expected


@pytest.mark.parametrize(
    ("target", "hosts"),
    [
        ("/", ()),
        ("/", ("",)),
        ("/", ("a.com, b.com",)),
        ("/", ("a.com/b.com",)),
        ("/", ("user@a.com",)),
        ("/", ("a.com:x",)),
        ("/", ("a.com:",)),
        ("/", ("a.com b.com",)),
        ("http://b.com/", ("a.com",)),
        ("http://a.com:81/", ("a.com",)),
        ("http://user@a.com/", ("a.com",)),
        ("a.com:443", ("a.com",)),
    ],
)
def test_ambiguous_requests(target: str, hosts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError):
        httphost.host(_request(target, *hosts))


def test_connect_is_refused() -> None:
    with pytest.raises(ValueError, match="CONNECT"):
        httphost.host(_request("a.com:443", "a.com", method="CONNECT"))


@pytest.mark.parametrize(
    ("target", "path"),
    [("/a?b", "/a?b"), ("http://a.com", "/"), ("http://a.com/x", "/x"), ("HTTP://a?q", "/?q"), ("*", "*")],
)
def test_paths(target: str, path: str) -> None:
    assert httphost.path(target.encode()) == path.encode()
