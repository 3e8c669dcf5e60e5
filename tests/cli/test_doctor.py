"""What `doctor` finds and what it concludes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hutch.host import doctor
from hutch.host.doctor import Check, Status


def _by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_examination_finds_and_leaves_nothing(tmp_path: Path) -> None:
    checks = _by_name(doctor.examine(tmp_path / "home" / "not" / "there"))
    assert checks["kernel"].status is Status.OK
    assert checks["namespaces"].status is Status.OK
    assert checks["overlayfs"].status is Status.OK
    assert checks["disk space"].found.endswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert ("idmapped mounts" in checks) == (os.geteuid() == 0)
    for check in checks.values():
        assert check.gives and check.found
        if check.status is Status.MISSING:
            assert check.remedy or not check.needed


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_which", lambda name: None)
    checks = _by_name(doctor.examine("/tmp"))
    assert checks["qemu-system-x86_64"].remedy == "apt-get install -y qemu-system-x86"
    assert checks["nft"].status is Status.MISSING
    assert checks["mmdebstrap"].remedy == "apt-get install -y mmdebstrap"


def test_a_missing_agent_means_no_boxes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HUTCH_AGENT", str(tmp_path / "absent"))
    checks = doctor.examine(tmp_path)
    assert _by_name(checks)["agent"].status is Status.MISSING
    assert not doctor.able(checks)


def test_only_what_is_needed_decides() -> None:
    optional = Check(name="nft", status=Status.MISSING, found="", gives="")
    assert doctor.able([optional])
    needed = Check(name="kernel", status=Status.MISSING, found="", gives="", needed=True)
    assert not doctor.able([optional, needed])


@pytest.mark.root
def test_a_file_system_that_cannot_hold_boxes_is_told() -> None:
    found = doctor._try_idmapped_mount(Path("/proc"))
    assert found
