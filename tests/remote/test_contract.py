"""The contract suite of the embedded runtime, over a server process."""

from __future__ import annotations

import pytest

from tests.runtime import (
    test_box_copies,
    test_box_files,
    test_box_life,
    test_exec_ending,
    test_exec_flow,
    test_exec_losing,
    test_exec_waiting,
)

pytestmark = [pytest.mark.root, pytest.mark.anyio]

SUITES = (
    test_exec_waiting,
    test_exec_flow,
    test_exec_losing,
    test_exec_ending,
    test_box_life,
    test_box_files,
    test_box_copies,
)
for suite in SUITES:
    for name, value in list(vars(suite).items()):
        if name.startswith("test_"):
            globals()[f"{name}"] = value
