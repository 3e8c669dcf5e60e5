"""What it costs to make a box and run a first command in it, the image being there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bench.rows import Goal, Quantity, Row, compare
from bench.samples import Outcome, alternate

if TYPE_CHECKING:
    from bench.samples import Subject
    from bench.stage import Stage

_SHARES = {"crun": 0.5, "runc": 0.25, "podman": 0.1, "docker": 0.1}
_GOALS: dict[str | None, Goal] = {
    None: Goal("at most 25 ms", "value", at_most=25),
    "docker run --rm": Goal("at least 20 × faster", "ratio", at_least=20),
    "podman run --rm": Goal("at least 20 × faster", "ratio", at_least=20),
}
_TITLES = {"crun": "crun run", "runc": "runc run", "podman": "podman run --rm", "docker": "docker run --rm"}
# These take their container away before they return.
_REMOVES = ("podman run --rm", "docker run --rm")


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of create → first command done, without and with the removal."""
    whole = Outcome()

    async def ours() -> float:
        began = time.perf_counter()
        box = await stage.runtime.create(stage.image)
        await box.run("true")
        done = time.perf_counter() - began
        await box.remove(force=True)
        whole.samples.append(time.perf_counter() - began)
        return done

    subjects: dict[str, Subject] = {"hutch": ours}
    shares = {"hutch": stage.plan.starts}
    for name, peer in stage.peers.items():
        subjects[_TITLES[name]] = stage.measured(peer.one_shot)
        shares[_TITLES[name]] = max(2, int(stage.plan.starts * _SHARES[name]))
    outcomes = await alternate(subjects, shares, budget=stage.plan.budget)
    del whole.samples[:1]  # the warm-up
    peers = outcomes | {_TITLES[name]: outcome for name, outcome in stage.missing().items()}
    started = compare(Quantity("create", "create a box, run `true`", "ms", 1e3), peers.pop("hutch"), peers, _GOALS)
    removing = {name: peers[name] for name in _REMOVES}
    return started + compare(Quantity("create", "create a box, run `true`, remove it", "ms", 1e3), whole, removing)
