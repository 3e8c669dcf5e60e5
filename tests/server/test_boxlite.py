"""The published client, unmodified, against our server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.server.conftest import Served

pytestmark = pytest.mark.root

SCRIPT = str(Path(__file__).with_name("cases.py"))

CASES = (
    "life",
    "commands",
    "endings",
    "terminals",
    "inputs",
    "volume_of_output",
    "attaching",
    "main_command",
    "files",
    "copies",
    "volumes",
    "images_and_metrics",
    "refusals",
    "network",
    "tunnels",
    "simple_box",
    "sync_simple_box",
    "cut_before_exit",
    "cut_before_output",
)


@pytest.mark.parametrize("case", CASES)
def test_published_client(served: Served, case: str) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, case, served.url],
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert done.stdout == "passed\n", done.stderr[-4000:]
