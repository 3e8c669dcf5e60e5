"""Which ids boxes have."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from hutch.host import mapping


def test_root_gets_ids_that_no_account_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(mapping, "_host_ids_reach", lambda limit: True)
    ids = mapping.current.__wrapped__()
    assert (ids.uid_map, ids.owner, ids.rootless, ids.single) == ("0 200000 65536", 200_000, False, False)
    assert ids.wrap(["rm", "x"]) == ["rm", "x"]


@pytest.mark.parametrize("text", ["", "other:100000:65536\n", "me:x:65536\nme:100000\n", "me:100000:0\n"])
def test_no_subordinate_range(tmp_path: Path, text: str) -> None:
    (tmp_path / "subuid").write_text(text)
    assert mapping._subordinate(tmp_path / "subuid", os.geteuid()) is None
    assert mapping._subordinate(tmp_path / "absent", os.geteuid()) is None


def test_the_longest_range_is_taken(tmp_path: Path) -> None:
    uid = os.geteuid()
    (tmp_path / "subuid").write_text(f"{uid}:5000:10\nother:1:1000000\n{uid}:100000:65536\n")
    assert mapping._subordinate(tmp_path / "subuid", uid) == (100_000, 65_536)


def test_an_ordinary_user_without_helpers_has_one_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    monkeypatch.setattr(os, "getegid", lambda: 4243)
    monkeypatch.setattr(mapping, "_subordinate", lambda path, uid: None)
    ids = mapping.current.__wrapped__()
    assert (ids.uid_map, ids.outer) == ("0 0 1", ("0 4242 1", "0 4243 1"))
    assert ids.single and ids.rootless
    assert ids.wrap(["rm", "x"])[1:] == ["mapped", "0 4242 1", "0 4243 1", "--", "rm", "x"]


def test_ranges_do_not_span_the_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    monkeypatch.setattr(mapping, "_subordinate", lambda path, uid: (100_000, 1000 if "gid" in path.name else 70_000))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    ids = mapping.current.__wrapped__()
    assert ids.outer is not None and ids.outer[0] == "0 4242 1\n1 100000 1000"
    assert ids.uid_map == "0 0 1\n1 1 1000"
    assert ids.count == 1001


def test_real_files_can_be_read() -> None:
    assert mapping.current().count in (1, 65_536) or mapping.current().rootless
    assert Path("/proc/self/uid_map").exists()
