"""Samples of one quantity, and how they are taken: alternately, so that a busy moment hits everybody."""

from __future__ import annotations

import math
import statistics
import time
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    Subject = Callable[[], Awaitable[float | None]]


class Summary(msgspec.Struct, frozen=True):
    """What a list of samples says. All but ``n`` in the unit of the samples."""

    n: int
    min: float
    p50: float
    p90: float
    p99: float
    mean: float


def summarize(values: Sequence[float]) -> Summary:
    """Return the summary of at least one sample (percentiles by the nearest rank)."""
    ordered = sorted(values)

    def rank(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return Summary(
        n=len(ordered),
        min=ordered[0],
        p50=statistics.median(ordered),
        p90=rank(0.9),
        p99=rank(0.99),
        mean=statistics.fmean(ordered),
    )


class Outcome(msgspec.Struct):
    """What came of one subject: samples in seconds (or whatever it returned), and the error that ended them early."""

    samples: list[float] = []
    error: str | None = None

    @property
    def summary(self) -> Summary | None:
        """The summary, if there is any sample."""
        return summarize(self.samples) if self.samples else None


async def alternate(
    subjects: Mapping[str, Subject], rounds: Mapping[str, int], *, warm_up: int = 1, budget: float = 60.0
) -> dict[str, Outcome]:
    """Sample all subjects in turn: in each round each one that has samples to give gives one.

    The samples of the first ``warm_up`` rounds are thrown away. A subject returns its own measurement, or ``None`` to
    be timed from call to return (seconds). One that raises is out, with its error noted. After ``budget`` seconds no
    further round begins.
    """
    outcomes = {name: Outcome() for name in subjects}
    longest = max((rounds[name] for name in subjects), default=0) + warm_up
    ends = time.monotonic() + budget
    for turn in range(longest):
        for name, subject in subjects.items():
            outcome = outcomes[name]
            # Who gives few samples gives them spread over the whole time.
            if outcome.error is not None or not _is_due(turn, longest, rounds[name] + warm_up):
                continue
            try:
                began = time.perf_counter()
                measured = await subject()
                elapsed = time.perf_counter() - began
            except Exception as error:  # of whatever kind: a peer that fails is a result, not the end of the run
                outcome.error = f"{type(error).__name__}: {error}"
                continue
            if turn >= warm_up:
                outcome.samples.append(elapsed if measured is None else measured)
        if time.monotonic() > ends and turn >= warm_up:
            break
    return outcomes


def _is_due(turn: int, turns: int, wanted: int) -> bool:
    return turn == 0 or turn * wanted // turns != (turn - 1) * wanted // turns
