"""The life of a box as a table, and what an operation may do in each state.

configured ──start──► running ──stop──► stopping ──stopped──► stopped ──start──► running …
                         │ ▲ pause/resume (paused)                 ▲
                         └─┴── died ──► failed | stopped ──────────┘
"""

from __future__ import annotations

import enum

from hutch.errors import InvalidStateError
from hutch.types import BoxState


class Event(enum.StrEnum):
    """What can happen to a box."""

    STARTED = "started"
    START_FAILED = "start failed"
    STOP = "stop"
    STOPPED = "stopped"
    """It was asked to stop, and did."""
    ENDED = "ended"
    """Its main command came to its end by itself."""
    DIED = "died"
    """It is gone without having been asked, and not by the end of its main command."""
    PAUSE = "pause"
    RESUME = "resume"


S, E = BoxState, Event

TRANSITIONS: dict[BoxState, dict[Event, BoxState]] = {
    S.CONFIGURED: {E.STARTED: S.RUNNING, E.START_FAILED: S.FAILED, E.STOP: S.STOPPED, E.STOPPED: S.STOPPED},
    S.RUNNING: {
        E.STARTED: S.RUNNING,
        E.STOP: S.STOPPING,
        E.STOPPED: S.STOPPED,
        E.ENDED: S.STOPPED,
        E.DIED: S.FAILED,
        E.PAUSE: S.PAUSED,
        E.START_FAILED: S.FAILED,
    },
    S.STOPPING: {E.STOPPED: S.STOPPED, E.ENDED: S.STOPPED, E.DIED: S.STOPPED, E.STOP: S.STOPPING},
    S.STOPPED: {E.STARTED: S.RUNNING, E.START_FAILED: S.FAILED, E.STOP: S.STOPPED, E.STOPPED: S.STOPPED},
    S.PAUSED: {
        E.RESUME: S.RUNNING,
        E.STOP: S.STOPPING,
        E.STOPPED: S.STOPPED,
        E.ENDED: S.STOPPED,
        E.DIED: S.FAILED,
        E.START_FAILED: S.FAILED,
    },
    S.FAILED: {E.STARTED: S.RUNNING, E.START_FAILED: S.FAILED, E.STOP: S.STOPPED, E.STOPPED: S.STOPPED},
    S.UNKNOWN: {E.STARTED: S.RUNNING, E.DIED: S.FAILED, E.STOPPED: S.STOPPED, E.ENDED: S.STOPPED, E.STOP: S.STOPPING},
}


def after(state: BoxState, event: Event) -> BoxState:
    """Return the state that follows. Raises `InvalidStateError` for a move that is not in the table."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise InvalidStateError(f"a box that is {state} cannot be {event}") from None


class Use(enum.Enum):
    """What a command or file operation on a box must do first."""

    GO = enum.auto()
    START = enum.auto()
    """Start the box, once, however many callers race."""
    REFUSE_STOPPED = enum.auto()
    REFUSE_JOB = enum.auto()
    """Its main command is its job: only an explicit start runs that again."""


def use(state: BoxState, *, job: bool, auto_resume: bool) -> Use:
    """Decide what an execution on a box in this state does. ``job``: the box was made with a main command."""
    if state in (S.RUNNING, S.PAUSED):
        return Use.GO
    if job:
        return Use.REFUSE_JOB
    if state is S.CONFIGURED or auto_resume:
        return Use.START
    return Use.REFUSE_STOPPED
