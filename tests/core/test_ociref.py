"""References: the grammar of distribution/reference, and what people type."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.core.ociref import is_digest, parse
from hutch.errors import InvalidArgumentError

SHA = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "full", "familiar"),
    [
        ("busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
        ("docker.io/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest", "busybox:latest"),
        ("user/app", "docker.io/user/app:latest", "user/app:latest"),
        ("library/app", "docker.io/library/app:latest", "app:latest"),
        ("library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
        ("ghcr.io/a/b/c:v1", "ghcr.io/a/b/c:v1", "ghcr.io/a/b/c:v1"),
        ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
        ("localhost:5000/x:tag", "localhost:5000/x:tag", "localhost:5000/x:tag"),
        (f"localhost:5000/x:tag@{SHA}", f"localhost:5000/x:tag@{SHA}", f"localhost:5000/x:tag@{SHA}"),
        (f"app@{SHA}", f"docker.io/library/app@{SHA}", f"app@{SHA}"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
        ("HOST/app", "HOST/app:latest", "HOST/app:latest"),
        ("a__b/c--d.e_f:X_.-y", "docker.io/a__b/c--d.e_f:X_.-y", "a__b/c--d.e_f:X_.-y"),
        ("localhost:5000", "docker.io/library/localhost:5000", "localhost:5000"),
    ],
)
def test_forms(text: str, full: str, familiar: str) -> None:
    reference = parse(text)
    assert (str(reference), reference.familiar) == (full, familiar)
    assert parse(full) == parse(familiar) == reference


def test_digest_decides() -> None:
    assert parse(f"a:b@{SHA}").target == SHA
    assert parse("a:b").target == "b"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no repository name"),
        ("a/", "not a repository name"),
        ("Busybox", "lower case"),
        ("ghcr.io/A", "lower case"),
        ("a:", "not a tag"),
        ("a:b:c", "not a tag"),
        ("a:" + "x" * 129, "not a tag"),
        ("a:-x", "not a tag"),
        ("a@", "not a digest"),
        ("a@sha256:abc", "not a digest"),
        ("a@md5:" + "0" * 32, "not a digest"),
        (f"a@{SHA.upper()}", "not a digest"),
        ("a..b", "not a repository name"),
        ("a___b", "not a repository name"),
        ("a/../b", "not a repository name"),
        ("-host.io/a", "host name"),
        ("host.io:x/a", "host name"),
        ("a b", "not a repository name"),
        ("a\n", "not a repository name"),
        ("a:b\n", "not a tag"),
        ("a" * 300, "longer"),
        ("0" * 64, "mistaken"),
        ("http://host/a", "host name"),
        ("ünicode", "not a repository name"),
        ("a:１", "not a tag"),
    ],
)
def test_refusals(text: str, cause: str) -> None:
    with pytest.raises(InvalidArgumentError, match=cause):
        parse(text)


part = st.from_regex(r"[a-z0-9]+(?:(?:\.|_|__|-{1,3})[a-z0-9]+){0,2}", fullmatch=True)
domain = st.one_of(
    st.just("localhost"),
    st.from_regex(r"[a-z0-9]{1,8}\.[a-z]{2,5}(:[0-9]{1,5})?", fullmatch=True),
    st.from_regex(r"[a-z]{1,8}:[0-9]{1,5}", fullmatch=True),
)
tags = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,30}", fullmatch=True)
digests = st.from_regex(r"sha256:[a-f0-9]{64}", fullmatch=True)


@given(domain, st.lists(part, min_size=1, max_size=4), st.none() | tags, st.none() | digests)
def test_every_whole_reference_is_taken_apart_and_put_together(
    host: str, path: list[str], tag: str | None, digest: str | None
) -> None:
    text = f"{host}/{'/'.join(path)}" + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    reference = parse(text)
    assert (reference.domain, reference.path) == (host, "/".join(path))
    assert (reference.tag, reference.digest) == (tag if tag or digest else "latest", digest)
    assert parse(str(reference)) == parse(reference.familiar) == reference


@given(st.text(max_size=80))
def test_any_text_is_refused_or_stable(text: str) -> None:
    try:
        reference = parse(text)
    except InvalidArgumentError:
        return
    assert parse(str(reference)) == parse(reference.familiar) == reference
    assert str(reference).isascii()
    assert ".." not in str(reference).partition(":")[0].split("/")


@given(st.text(max_size=140))
def test_digests(text: str) -> None:
    if is_digest(text):
        algorithm, _, value = text.partition(":")
        assert len(bytes.fromhex(value)) == {"sha256": 32, "sha512": 64}[algorithm]
