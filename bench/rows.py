"""A row of the results: one quantity of ours beside the same of one peer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from bench.samples import Outcome, Summary

if TYPE_CHECKING:
    from collections.abc import Mapping


class Goal(msgspec.Struct, frozen=True):
    """What we promised: a bound for our value, or for the ratio to the peer."""

    text: str
    of: Literal["value", "ratio"]
    at_least: float | None = None
    at_most: float | None = None

    def met(self, row: Row) -> bool | None:
        """Whether the row keeps it; ``None`` when there is nothing to judge."""
        figure = row.value if self.of == "value" else row.ratio
        if figure is None:
            return None
        return (self.at_least is None or figure >= self.at_least) and (self.at_most is None or figure <= self.at_most)


class Row(msgspec.Struct):
    """``value`` and ``peer_value`` are medians; ``ratio`` says how many times better we are (below 1: worse)."""

    group: str
    name: str
    unit: str
    value: float | None
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    goal: str | None = None
    met: bool | None = None
    samples: Summary | None = None
    peer_samples: Summary | None = None
    note: str | None = None


class Quantity(msgspec.Struct, frozen=True):
    """What is measured. ``scale`` turns a sample into the unit."""

    group: str
    name: str
    unit: str
    scale: float = 1.0
    more_is_better: bool = False


def compare(
    what: Quantity, ours: Outcome, peers: Mapping[str, Outcome], goals: Mapping[str | None, Goal] | None = None
) -> list[Row]:
    """Return one row of ours alone, and one a peer. ``goals``: by peer; ``None`` is the goal for our value itself."""
    wanted = goals or {}
    rows = [_row(what, ours, None, None, wanted.get(None))]
    rows += [_row(what, ours, name, outcome, wanted.get(name)) for name, outcome in peers.items()]
    return rows


def single(what: Quantity, value: float, goal: Goal | None = None, *, note: str | None = None) -> Row:
    """Return the row of a quantity that was measured once."""
    row = _row(what, Outcome([value]), None, None, goal)
    row.note = note
    return row


def _row(what: Quantity, ours: Outcome, peer: str | None, theirs: Outcome | None, goal: Goal | None) -> Row:
    samples = _scaled(ours, what.scale)
    peer_samples = _scaled(theirs, what.scale) if theirs is not None else None
    row = Row(
        group=what.group,
        name=what.name,
        unit=what.unit,
        value=samples.p50 if samples else None,
        peer=peer,
        peer_value=peer_samples.p50 if peer_samples else None,
        samples=samples,
        peer_samples=peer_samples,
        note=ours.error or (theirs.error if theirs is not None else None),
    )
    if row.value and row.peer_value:
        row.ratio = row.value / row.peer_value if what.more_is_better else row.peer_value / row.value
    if goal is not None:
        row.goal = goal.text
        row.met = goal.met(row)
    return row


def _scaled(outcome: Outcome, scale: float) -> Summary | None:
    summary = outcome.summary
    if summary is None:
        return None
    return Summary(
        n=summary.n,
        min=summary.min * scale,
        p50=summary.p50 * scale,
        p90=summary.p90 * scale,
        p99=summary.p99 * scale,
        mean=summary.mean * scale,
    )
