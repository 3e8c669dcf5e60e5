"""The records of STAT and LIST, which come out of the box."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hutch.core.filelist import TYPES, parse_listing
from hutch.errors import HutchError, UpstreamUnavailableError
from hutch.types import FileInfo

names = st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(TYPES)),
            st.integers(0, 0o7777),
            st.integers(0, 65535),
            st.integers(0, 2**62),
            names,
            names,
        ),
        max_size=5,
    )
)
def test_records_round_trip(entries: list[tuple[str, int, int, int, bytes, bytes]]) -> None:
    wire = b""
    for kind, mode, owner, size, name, target in entries:
        wire += b"%s %o %d %d %d 1500000000 %s\0%s\0" % (
            kind.encode(), mode, owner, owner, size, name, target if kind == "l" else b"",
        )  # fmt: skip
    assert parse_listing(wire) == [
        FileInfo(
            name=name.decode("utf-8", "surrogateescape"),
            type=TYPES[kind],
            mode=mode,
            uid=owner,
            gid=owner,
            size=size,
            mtime=1.5,
            target=target.decode("utf-8", "surrogateescape") if kind == "l" else None,
        )
        for kind, mode, owner, size, name, target in entries
    ]


@given(st.binary(max_size=200))
@example(b"f 644 0 0 1 " + b"9" * 5000 + b" name\0\0")
@example(b"f 644 0 0 1 1" + b"0" * 400 + b" name\0\0")
@example(b"\xff 644 0 0 0 0 x\0\0")
def test_rubbish_is_refused_and_never_anything_else(data: bytes) -> None:
    try:
        parse_listing(data)
    except HutchError as error:
        assert isinstance(error, UpstreamUnavailableError)


@pytest.mark.parametrize(
    "wire", [b"x", b"\0", b"f 644 0 0 0 0 x\0", b"q 644 0 0 0 0 x\0\0", b"f 9 0 0 0 0 x\0\0", b"f 644 0\0\0"]
)
def test_malformed_records_are_refused(wire: bytes) -> None:
    with pytest.raises(UpstreamUnavailableError):
        parse_listing(wire)
