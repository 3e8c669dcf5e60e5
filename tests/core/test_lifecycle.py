"""The table of a box's life."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.core.lifecycle import TRANSITIONS, Event, Use, after, use
from hutch.errors import InvalidStateError
from hutch.types import BoxState

ALIVE = {BoxState.RUNNING, BoxState.STOPPING, BoxState.PAUSED, BoxState.UNKNOWN}


def test_every_state_has_its_row() -> None:
    assert set(TRANSITIONS) == set(BoxState)


@given(st.sampled_from(BoxState), st.lists(st.sampled_from(Event), max_size=30))
def test_every_walk_stays_in_the_table_and_a_refused_move_changes_nothing(state: BoxState, events: list[Event]) -> None:
    for event in events:
        try:
            state = after(state, event)
        except InvalidStateError as error:
            assert str(state) in str(error)
            assert event not in TRANSITIONS[state]
        assert state in TRANSITIONS


@pytest.mark.parametrize("state", BoxState)
def test_every_state_can_be_left_for_running_and_for_stopped(state: BoxState) -> None:
    for goal in (BoxState.RUNNING, BoxState.STOPPED):
        reached, border = {state}, {state}
        while border:
            border = {to for s in border for to in TRANSITIONS[s].values()} - reached
            reached |= border
        assert goal in reached


@pytest.mark.parametrize("state", sorted(ALIVE))
def test_a_live_box_can_be_found_dead(state: BoxState) -> None:
    assert after(state, Event.DIED) in (BoxState.FAILED, BoxState.STOPPED)
    assert after(state, Event.ENDED) is BoxState.STOPPED


def test_nothing_but_a_start_makes_a_box_run() -> None:
    for state in set(BoxState) - ALIVE:
        for event in Event:
            if event is not Event.STARTED and event in TRANSITIONS[state]:
                assert after(state, event) not in ALIVE


@pytest.mark.parametrize("state", BoxState)
@pytest.mark.parametrize("job", [True, False])
@pytest.mark.parametrize("auto_resume", [True, False])
def test_what_an_execution_does_first(state: BoxState, job: bool, auto_resume: bool) -> None:
    decision = use(state, job=job, auto_resume=auto_resume)
    if state in (BoxState.RUNNING, BoxState.PAUSED):
        assert decision is Use.GO
    elif job:
        assert decision is Use.REFUSE_JOB
    elif state is BoxState.CONFIGURED or auto_resume:
        assert decision is Use.START
    else:
        assert decision is Use.REFUSE_STOPPED
