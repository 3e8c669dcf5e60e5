"""The contract suite of the embedded runtime, over an API process and a runner process."""

from __future__ import annotations

import pytest

from tests.remote import contract

pytestmark = [pytest.mark.root, pytest.mark.anyio]

ELSEWHERE = frozenset(
    {
        # They make their box past the runner, on its own machine (for the chain: tests/e2e/test_fleet.py).
        "test_3_4_killing_the_host_process_in_mid_stream_loses_nothing",
        "test_3_4_a_host_that_dies_before_it_read_anything_loses_nothing",
    }
)

globals().update(contract.cases(without=ELSEWHERE))
