"""Ids and names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.core import ids
from hutch.errors import InvalidArgumentError


@given(st.binary(min_size=9, max_size=32))
def test_ids_have_their_form(entropy: bytes) -> None:
    made = ids.from_random(entropy)
    assert ids.is_id(made)
    assert len(made) == 12
    assert made == ids.from_random(entropy)


@pytest.mark.parametrize(
    "text", ["", "a" * 11, "a" * 13, "a" * 11 + "\n", "a" * 12 + "\n", "a" * 11 + "é", "a" * 11 + "-", "../../../etc"]
)
def test_what_is_not_an_id(text: str) -> None:
    assert not ids.is_id(text)


@given(st.text(max_size=140))
def test_a_name_that_passes_is_safe_as_a_file_and_a_host_name(text: str) -> None:
    try:
        assert ids.check_name(text) == text
    except InvalidArgumentError:
        return
    assert 1 <= len(text) <= 128
    assert text.isascii()
    assert not set(text) & set("/\0\n ")
    assert text not in (".", "..")
    assert text[0].isalnum()


@pytest.mark.parametrize("name", ["a", "A1", "a.b_c-d", "x" * 128])
def test_legal_names(name: str) -> None:
    assert ids.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "x" * 129, "é"])
def test_illegal_names(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="name"):
        ids.check_name(name)
    with pytest.raises(InvalidArgumentError, match="volume"):
        ids.check_volume_name(name)


def test_a_volume_name_has_two_characters_at_least() -> None:
    assert ids.check_volume_name("ab") == "ab"
    with pytest.raises(InvalidArgumentError):
        ids.check_volume_name("a")
