"""Whether KVM is used: what a guest proves, not what a device file promises."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from hutch.host import kvm
from hutch.host.proc import boot_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the answer is kept; nobody has asked yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kvm.usable.cache_clear()
    yield tmp_path / "hutch/kvm"
    kvm.usable.cache_clear()


def test_a_guest_that_does_not_count_in_time_is_no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the machine may be."""
    monkeypatch.setattr(kvm, "SECONDS", 0.0)
    began = time.monotonic()
    assert not kvm.probe()
    assert time.monotonic() - began < 10


def test_the_answer_is_kept_until_the_machine_restarts(answer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[bool] = []
    real = kvm.probe

    def counted() -> bool:
        probes.append(real())
        return probes[-1]

    monkeypatch.setattr(kvm, "probe", counted)
    first = kvm.usable()
    kvm.usable.cache_clear()  # another process
    assert kvm.usable() == first == probes[0] and len(probes) == 1
    for number, spoilt in enumerate(
        (answer.read_bytes().replace(boot_id().encode(), b"another boot"), b"\xff", b""), 2
    ):
        answer.write_bytes(spoilt)
        kvm.usable.cache_clear()
        assert kvm.usable() == first and len(probes) == number


def test_a_guest_that_did_not_come_up_is_the_last_word(answer: Path) -> None:
    kvm.usable()
    answer.write_text(answer.read_text().rpartition(" ")[0] + " yes")
    kvm.usable.cache_clear()
    assert kvm.usable()
    kvm.refuse()
    assert not kvm.usable()
    kvm.usable.cache_clear()
    assert not kvm.usable()
