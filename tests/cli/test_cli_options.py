"""Values of options: what is accepted and what is refused, and how output is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.cli import options, output
from hutch.cli.terminal import DetachKeys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "mib"), [("512m", 512), ("2g", 2048), ("2G", 2048), ("1.5GiB", 1536), ("64", 64), ("1k", 1), ("1mb", 1)]
)
def test_memory(text: str, mib: int) -> None:
    assert options.memory(text) == mib


@pytest.mark.parametrize(("text", "gb"), [("10g", 10), ("10", 10), ("512m", 1), ("1t", 1024)])
def test_disk(text: str, gb: int) -> None:
    assert options.disk(text) == gb


@pytest.mark.parametrize("text", ["", "0", "-1", "lots", "1x", "1e3", "nan", "g", "9" * 40, "１"])
def test_bad_sizes(text: str) -> None:
    for parse in (options.memory, options.disk):
        with pytest.raises(ValueError, match="size"):
            parse(text)


@pytest.mark.parametrize("text", ["0", "1.5", "-2", "", "two", "²", "9" * 30])
def test_bad_cpus(text: str) -> None:
    with pytest.raises(ValueError, match="number of CPUs"):
        options.cpus(text)


@pytest.mark.parametrize(("text", "seconds"), [("30", 30), ("500ms", 0.5), ("5m", 300), ("1h", 3600), ("1.5s", 1.5)])
def test_duration(text: str, seconds: float) -> None:
    assert options.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "5 parsecs"])
def test_bad_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a time"):
        options.duration(text)


@pytest.mark.parametrize("text", ["TERM", "SIGTERM", "sigterm", "15"])
def test_signal(text: str) -> None:
    assert options.signum(text) == 15


@pytest.mark.parametrize("text", ["", "0", "65", "NOPE", "-9"])
def test_bad_signal(text: str) -> None:
    with pytest.raises(ValueError, match="not a signal"):
        options.signum(text)


def test_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRESENT", "here")
    monkeypatch.delenv("ABSENT", raising=False)
    assert options.env("A=b=c") == ("A", "b=c")
    assert options.env("A=") == ("A", "")
    assert options.env("PRESENT") == ("PRESENT", "here")
    assert options.env("ABSENT") is None
    with pytest.raises(ValueError, match="no name"):
        options.env("=x")
    file = tmp_path / "env"
    file.write_text("# comment\n\nA=1\r\nPRESENT\nABSENT\nB= spaced \n")
    assert options.env_file(str(file)) == [("A", "1"), ("PRESENT", "here"), ("B", " spaced ")]
    file.write_text("A=1\n=2\n")
    with pytest.raises(ValueError, match="line 2"):
        options.env_file(str(file))
    with pytest.raises(ValueError, match="cannot read"):
        options.env_file(str(tmp_path / "nope"))


def test_mount_source_is_decided_by_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    host = str(tmp_path / "data")
    for source in (host, "./data", "~/data", f"../{tmp_path.name}/data"):
        assert options.mount(f"{source}:/mnt:ro") == options.MountOption(host, "", "/mnt", True)
    assert options.mount(".:/mnt").source == str(tmp_path)
    assert options.mount("data:/mnt:rw") == options.MountOption("", "data", "/mnt", False)


@pytest.mark.parametrize(
    "text", ["", "x", ":/mnt", "vol:", "vol:relative", "vol:/mnt:zz", "vol:/mnt:ro:x", "./absent:/mnt"]
)
def test_bad_mounts(text: str) -> None:
    with pytest.raises(ValueError):
        options.mount(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "just now"),
        (1, "1 second ago"),
        (59, "59 seconds ago"),
        (180, "3 minutes ago"),
        (7200, "2 hours ago"),
        (86400 * 3, "3 days ago"),
        (-5, "just now"),
    ],
)
def test_ago(seconds: float, text: str) -> None:
    assert output.ago(1000.0, 1000.0 + seconds) == text


def test_size() -> None:
    assert [output.size(n) for n in (None, 0, 1023, 1536, 200 << 20, 3 << 40)] == [
        "-", "0 B", "1023 B", "1.5 KiB", "200 MiB", "3.0 TiB",
    ]  # fmt: skip


@given(st.text())
def test_clean_text_cannot_steer_a_terminal(text: str) -> None:
    assert output.clean(text).isprintable()
    if text.isprintable():
        assert output.clean(text) == text


@given(st.lists(st.sampled_from([b"a", b"\x10", b"\x11", b"\x10\x11", b"xy"])))
def test_detach_keys_do_not_depend_on_how_the_bytes_come(pieces: list[bytes]) -> None:
    keys, passed, detached = DetachKeys(), b"", False
    for piece in pieces:
        data, detached = keys.feed(piece)
        passed += data
        if detached:
            break
    typed = b"".join(pieces)
    before, found, _ = typed.partition(b"\x10\x11")
    assert detached == bool(found)
    assert passed == (before if found else typed.removesuffix(b"\x10"))
