"""The contract suite of the embedded runtime, for a runtime elsewhere: each test of it that says nothing about the
insides of a runtime in this very process. A module that updates its globals with them has them as its own."""

from __future__ import annotations

from typing import Any

from tests.runtime import (
    test_box_copies,
    test_box_files,
    test_box_life,
    test_exec_ending,
    test_exec_flow,
    test_exec_losing,
    test_exec_waiting,
)

SUITES = (
    test_exec_waiting,
    test_exec_flow,
    test_exec_losing,
    test_exec_ending,
    test_box_life,
    test_box_files,
    test_box_copies,
)

ELSEWHERE = {
    # They look into the home, which is the server's; or into the engine.
    "test_1_8_an_abandoned_create_leaves_no_box",
    "test_3_3_what_was_released_is_reaped_and_what_never_was_is_not_found",
    "test_removing_leaves_nothing",
    "test_a_box_whose_pauser_was_killed_can_be_resumed",
    "test_an_interrupted_restore_is_finished_once",
    "test_a_tampered_archive_is_refused_and_leaves_nothing",
    "test_volumes_are_shared_and_outlive_boxes",
    "test_errors_name_the_path",
    "test_3_1_a_cut_while_a_command_is_being_started",
    "test_3_1_a_cut_while_a_command_is_slow_to_start",
    # From afar a start that was given up may have been carried out (docs/remote.md).
    "test_1_8_an_abandoned_start_leaves_nothing_running_and_can_be_repeated",
    # Not offered from afar.
    "test_host_folders_read_only_and_writable",
}


def cases(*, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The tests, by name."""
    return {
        name: value
        for suite in SUITES
        for name, value in vars(suite).items()
        if name.startswith("test_") and name not in ELSEWHERE | without
    }
