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
        "test_killed_hosts_leave_a_home_that_the_next_one_puts_in_order",
        # Long, and about what happens within a box, of which the chain has no part.
        "test_2_2_after_the_hold_it_runs_on_and_the_reader_is_told_of_the_gap",
        "test_2_2_an_orderly_detach_lets_it_run_on_and_the_next_watcher_is_told",
        "test_2_3_bytes_stay_in_order_through_shared_memory",
        "test_2_3_a_slow_reader_of_the_shared_window_sees_no_overwritten_byte",
        "test_a_sparse_gibibyte_needs_no_memory",
    }
)

globals().update(contract.cases(without=ELSEWHERE))
