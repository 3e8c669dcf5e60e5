"""The long suites in short form; `make census`, `make chain-census`, `make crash`, `make soak` and `make vm-soak` run
them in full."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.slow]

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def run(script: str, *arguments: str, seconds: float) -> str:
    """Run a suite to its end and return what it says."""
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, *arguments], capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(240)
def test_census() -> None:
    assert run("census.py", "--count", "3000", seconds=200).startswith("3000 executions, 0 deviations")


@pytest.mark.timeout(240)
def test_crash() -> None:
    assert run("crash.py", "--rounds", "15", seconds=200).startswith("15 rounds, 0 findings")


@pytest.mark.timeout(150)
def test_chain_census() -> None:
    assert run("chain_census.py", "--count", "150", seconds=120).startswith("150 executions, 0 deviations")


@pytest.mark.timeout(150)
def test_soak() -> None:
    """Too short to judge growth by; but nothing may be wrong, hang, or be left behind."""
    assert "0 problems" in run("soak.py", "--minutes", "0.25", seconds=120)


@pytest.mark.timeout(240)
def test_census_of_vms() -> None:
    arguments = ("--isolation", "vm", "--boxes", "2", "--count", "120")
    assert run("census.py", *arguments, seconds=200).startswith("120 executions, 0 deviations")


@pytest.mark.timeout(240)
def test_crash_of_vms() -> None:
    assert run("crash.py", "--isolation", "vm", "--rounds", "2", seconds=200).startswith("2 rounds, 0 findings")


@pytest.mark.timeout(240)
def test_soak_of_vms() -> None:
    """Too short to judge growth by; but nothing may be wrong, or be left behind."""
    assert "0 problems" in run("vm_soak.py", "--count", "10", seconds=200)
