"""Placeholders in requests."""

from __future__ import annotations

import base64

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.core.secrets import Substitution, placeholder, substitute
from hutch.types import Secret

VALUE = "s3cr&t value"
KEY = Substitution(placeholder(Secret(name="KEY", value="", hosts=())).encode(), VALUE.encode())
OTHER = Substitution(placeholder(Secret(name="KEY2", value="", hosts=())).encode(), b"other")

header_text = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20).map(str.encode)


def _request(target: bytes = b"/", **headers: bytes) -> h11.Request:
    pairs = [(b"Host", b"example.com"), *((name.encode(), value) for name, value in headers.items())]
    return h11.Request(method=b"GET", target=target, headers=pairs)


def _header(request: h11.Request, name: bytes) -> bytes:
    return dict(request.headers)[name]


@given(header_text, header_text)
def test_headers(before: bytes, after: bytes) -> None:
    changed = substitute(_request(X=before + KEY.placeholder + after), [KEY, OTHER])
    assert _header(changed, b"x") == (before + KEY.value + after).strip()


def test_each_placeholder_gets_its_own_value() -> None:
    changed = substitute(_request(A=KEY.placeholder + b" " + OTHER.placeholder), [KEY, OTHER])
    assert _header(changed, b"a") == KEY.value + b" other"


def test_unknown_placeholders_stay() -> None:
    request = _request(A=b"<HUTCH_SECRET:NOBODY>")
    assert _header(substitute(request, [KEY]), b"a") == b"<HUTCH_SECRET:NOBODY>"


def test_basic_credentials() -> None:
    plain = base64.b64encode(b"user:" + KEY.placeholder)
    changed = _header(substitute(_request(Authorization=b"Basic " + plain), [KEY]), b"authorization")
    assert base64.b64decode(changed.removeprefix(b"Basic ")) == b"user:" + KEY.value
    for value in (b"Basic ???", b"Basic " + base64.b64encode(b"user:password"), b"Bearer x"):
        assert _header(substitute(_request(Authorization=value), [KEY]), b"authorization") == value


@pytest.mark.parametrize(
    "written",
    [
        b"<HUTCH_SECRET:KEY>",
        b"%3CHUTCH_SECRET%3AKEY%3E",
        b"%3chutch_secret%3akey%3e".replace(b"hutch_secret", b"HUTCH_SECRET").replace(b"key", b"KEY"),
        b"%3CHUTCH_SECRET:KEY%3E",
    ],
)
def test_the_query(written: bytes) -> None:
    changed = substitute(_request(b"/path?a=1&key=" + written + b"&b=2"), [KEY])
    assert changed.target == b"/path?a=1&key=s3cr%26t%20value&b=2"


def test_the_path_and_the_host_stay() -> None:
    request = h11.Request(method=b"GET", target=b"/" + KEY.placeholder, headers=[(b"Host", KEY.placeholder)])
    changed = substitute(request, [KEY])
    assert changed.target == request.target and _header(changed, b"host") == KEY.placeholder


def test_values_are_not_shown() -> None:
    assert VALUE not in repr(KEY) and "s3cr" not in repr([KEY])
