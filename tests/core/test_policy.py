"""Rules of an allow-list, and what they admit."""

from __future__ import annotations

import ipaddress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.core.policy import (
    HOST_NAME,
    Address,
    Policy,
    Verdict,
    covers,
    is_special,
    parse_rule,
    plain_address,
    plain_name,
)
from hutch.errors import InvalidArgumentError
from hutch.types import Outbound

ports = st.integers(1, 65535)
labels = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
names = st.lists(labels, min_size=2, max_size=4).map(".".join)
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
special = st.sampled_from(
    [
        *("127.0.0.1", "127.8.9.10", "0.0.0.0", "169.254.169.254", "224.0.0.1", "255.255.255.255", "100.100.100.200"),
        *("::1", "::", "fe80::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254"),
        *("64:ff9b::7f00:1", "2002:7f00:1::", "64:ff9b::a9fe:a9fe"),
    ]
).map(ipaddress.ip_address)


def _list(*rules: str) -> Policy:
    return Policy(Outbound.ALLOW_LIST, rules)


@pytest.mark.parametrize(
    ("rule", "host", "limits"),
    [
        ("1.2.3.4", "1.2.3.4/32", (1, 65535)),
        ("1.2.3.4:443", "1.2.3.4/32", (443, 443)),
        ("10.0.0.0/8:8000-8100", "10.0.0.0/8", (8000, 8100)),
        ("::1", "::1/128", (1, 65535)),
        ("2001:db8::/32", "2001:db8::/32", (1, 65535)),
        ("[2001:db8::]:80", "2001:db8::/128", (80, 80)),
        ("[2001:db8::/32]", "2001:db8::/32", (1, 65535)),
        ("Example.COM.", "example.com", (1, 65535)),
        ("*.example.com:443", "*.example.com", (443, 443)),
        ("*", "*", (1, 65535)),
        ("xn--bcher-kva.example", "xn--bcher-kva.example", (1, 65535)),
    ],
)
def test_rules(rule: str, host: str, limits: tuple[int, int]) -> None:
    parsed = parse_rule(rule)
    assert (str(parsed.network) if parsed.network else parsed.name) == host
    assert parsed.ports == limits


@pytest.mark.parametrize(
    "rule",
    [
        *("", ":80", "a b", "1.2.3", "1.2.3.4.5", "10.0.0.1/8", "1.2.3.4/33", "example.com:0", "example.com:65536"),
        *("example.com:80-79", "example.com:x", "example.com:", "[::1", "[::1]80", "https://example.com", "a/b"),
        *("*example.com", "a.*.com", "*.*.com", "-a.com", "a..b", "127.1", "0x7f.1", "example.com:80:81", "a.com\n"),
        *("bücher.example", "a" * 64 + ".com", "::1:80:x"),
    ],
)
def test_malformed_rules(rule: str) -> None:
    with pytest.raises(InvalidArgumentError):
        parse_rule(rule)


@given(addresses, ports)
def test_disabled_admits_nothing(address: Address, port: int) -> None:
    policy = Policy(Outbound.DISABLED)
    assert policy.address(address, port) is Verdict.REFUSE
    assert not policy.may_look_up("example.com")


@given(special, ports, st.sampled_from(["enabled", "0.0.0.0/0", "::/0", "*", "0.0.0.0/1", "8000::/1"]))
def test_special_addresses_need_a_rule_about_just_them(address: Address, port: int, rule: str) -> None:
    policy = Policy(Outbound.ENABLED) if rule == "enabled" else _list(rule, "0.0.0.0/0", "::/0")
    assert policy.address(address, port) is Verdict.REFUSE
    assert not policy.answer("example.com", address, port)


@pytest.mark.parametrize(
    ("rule", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.0/8", "127.9.9.9"),
        ("169.254.169.254:80", "169.254.169.254"),
        ("169.254.0.0/16", "::ffff:169.254.169.254"),
        ("fe80::/10", "fe80::1"),
    ],
)
def test_special_addresses_can_be_named(rule: str, address: str) -> None:
    for policy in (_list(rule), Policy(Outbound.ENABLED, [rule])):
        assert policy.address(ipaddress.ip_address(address), 80) is Verdict.ALLOW


@given(st.ip_addresses(v=4), st.integers(8, 32), addresses, ports)
def test_a_network_admits_its_own_addresses_alone(base: Address, length: int, other: Address, port: int) -> None:
    network = ipaddress.ip_network(f"{base}/{length}", strict=False)
    policy = _list(f"{network}:{port}")
    inside = plain_address(other) in network
    assert (policy.address(other, port) is Verdict.ALLOW) <= inside
    assert policy.address(other, port % 65535 + 1) is Verdict.REFUSE
    if policy.address(network[0], port) is Verdict.ALLOW:
        mapped = ipaddress.IPv6Address(f"::ffff:{network[0]}")
        assert policy.address(mapped, port) is Verdict.ALLOW


@given(names, names, ports)
def test_names(name: str, other: str, port: int) -> None:
    policy = _list(f"{name}:{port}", f"*.{name}:{port}")
    assert policy.name(name, port) and policy.name(f"{other}.{name}", port)
    assert not policy.name(name, port % 65535 + 1)
    assert policy.name(other, port) == (other == name or other.endswith(f".{name}"))
    for near in (f"x{name}", f"{name}.{other}", f"{name}x", name.partition(".")[2]):
        assert policy.name(near, port) == (near == name or near.endswith(f".{name}"))
    assert policy.may_look_up(name) and policy.may_look_up(f"{other}.{name}")
    public = ipaddress.ip_address("1.2.3.4")
    assert policy.address(public, port) is Verdict.ASK
    assert policy.address(public, port % 65535 + 1) is Verdict.REFUSE


def test_a_wildcard_does_not_admit_the_name_itself() -> None:
    assert not _list("*.example.com").name("example.com", 80)


def test_the_host_must_be_named() -> None:
    for policy in (Policy(Outbound.ENABLED), _list("*"), _list("*.internal")):
        assert not policy.host(80)
    assert not _list("*").name(HOST_NAME, 80)
    assert _list(f"{HOST_NAME}:80").host(80) and not _list(f"{HOST_NAME}:80").host(81)
    assert Policy(Outbound.ENABLED, [HOST_NAME]).host(80)


@pytest.mark.parametrize("address", ["10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd12::1", "198.18.0.1"])
def test_private_answers(address: str) -> None:
    found = ipaddress.ip_address(address)
    assert not _list("example.com").answer("example.com", found, 80)
    assert not _list("example.com", f"{address}:81").answer("example.com", found, 80)
    assert _list("example.com", address).answer("example.com", found, 80)
    assert Policy(Outbound.ENABLED).answer("example.com", found, 80)


@pytest.mark.parametrize(
    ("most", "within", "beyond"),
    [
        ("example.com", ["example.com:443", "EXAMPLE.com"], ["*.example.com", "a.example.com", "10.0.0.1", "*"]),
        ("*.example.com", ["a.example.com", "*.a.example.com", "*.example.com:80-90"], ["example.com", "*", "*.com"]),
        ("*", ["example.com", "*.com", "*"], [HOST_NAME, "0.0.0.0/0", "10.0.0.1"]),
        ("10.0.0.0/8", ["10.1.0.0/16", "10.0.0.1:80"], ["0.0.0.0/0", "11.0.0.1", "::/0", "a.com"]),
        ("::/0", ["2001:db8::/32", "[::1]:80"], ["10.0.0.1", "0.0.0.0/0"]),
        ("10.0.0.1:80-90", ["10.0.0.1:80", "10.0.0.1:85-90"], ["10.0.0.1", "10.0.0.1:79-80", "10.0.0.1:90-91"]),
        (HOST_NAME, [HOST_NAME, f"{HOST_NAME}:80"], ["127.0.0.1", "a.com"]),
    ],
)
def test_what_a_rule_covers(most: str, within: list[str], beyond: list[str]) -> None:
    for text in within:
        assert covers(parse_rule(most), parse_rule(text)), text
    for text in beyond:
        assert not covers(parse_rule(most), parse_rule(text)), text


def test_rules_about_the_machine_itself() -> None:
    for text in (HOST_NAME, f"{HOST_NAME}:80", "127.0.0.1", "169.254.169.254:80", "fd00:ec2::254", "::1", "0.0.0.0"):
        assert is_special(parse_rule(text)), text
    # They admit nothing of that, though it is within them.
    for text in ("0.0.0.0/0", "::/0", "*", "*.internal", "10.0.0.1", "example.com"):
        assert not is_special(parse_rule(text)), text


def test_own_addresses_are_refused_unless_listed() -> None:
    own = ipaddress.ip_address("203.0.113.7")
    assert Policy(Outbound.ENABLED).address(own, 80) is Verdict.ALLOW
    assert Policy(Outbound.ENABLED).address(own, 80, own=True) is Verdict.REFUSE
    assert not _list("example.com").answer("example.com", own, 80, own=True)
    assert _list("203.0.113.7").address(own, 80, own=True) is Verdict.ALLOW


@given(st.text(max_size=40))
def test_plain_names_are_fixed_points(text: str) -> None:
    name = plain_name(text)
    assert plain_name(name) == name
    assert all(a != b or a != "." for a, b in pairwise(name))
    if name:
        with pytest.raises(ValueError):
            ipaddress.ip_address(name)
