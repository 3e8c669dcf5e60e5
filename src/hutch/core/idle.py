"""When a box that nobody uses is stopped, and when it is removed."""

from __future__ import annotations

import enum

import msgspec

MIN_SECONDS = 60


class Policy(msgspec.Struct, frozen=True, gc=False):
    """Seconds without activity after which a box is stopped and removed; 0 stands for never. ``auto_resume``: whether
    the next use starts it again after that stop."""

    auto_stop: int = 0
    auto_delete: int = 0
    auto_resume: bool = True


class Step(enum.Enum):
    """What is due."""

    NOTHING = enum.auto()
    STOP = enum.auto()
    DELETE = enum.auto()


def due(policy: Policy, *, running: bool, idle: float) -> Step:
    """Decide what happens to a box that has been idle for so many seconds. One that runs is stopped first, however
    late it is: nothing is ever removed from under a process."""
    if running:
        return Step.STOP if policy.auto_stop and idle >= policy.auto_stop else Step.NOTHING
    return Step.DELETE if policy.auto_delete and idle >= policy.auto_delete else Step.NOTHING
