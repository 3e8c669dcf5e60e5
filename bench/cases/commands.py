"""What it costs to run ``true`` in a box that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.peers import host
from bench.peers.base import call
from bench.rows import Goal, Quantity, Row, compare
from bench.samples import alternate

if TYPE_CHECKING:
    from bench.samples import Subject
    from bench.stage import Stage

_GOALS: dict[str | None, Goal] = {
    "subprocess.run": Goal("at most 2 × subprocess.run", "ratio", at_least=0.5),
    "crun exec": Goal("at least 5 × faster", "ratio", at_least=5),
    "docker exec": Goal("at least 40 × faster", "ratio", at_least=40),
}
# The share of the rounds that a peer gets: what takes a hundred times as long is sampled less.
_SHARES = {"crun": 0.4, "runc": 0.2, "podman": 0.05, "docker": 0.1}


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of exec latency."""
    box = await stage.runtime.create(stage.image)
    rounds = stage.plan.rounds

    async def ours() -> None:
        await box.run("true")

    subjects: dict[str, Subject] = {
        "hutch": ours,
        "posix_spawn + waitpid": host.spawn_and_wait,
        "subprocess.run": host.subprocess_run,
        "asyncio subprocess": host.asyncio_subprocess,
    }
    shares = dict.fromkeys(subjects, rounds)
    for name, peer in stage.peers.items():
        argv = peer.exec_argv("true")
        subjects[f"{name} exec"] = stage.timed(lambda argv=argv: call(argv))  # type: ignore[misc]  # a bound default
        shares[f"{name} exec"] = max(3, int(rounds * _SHARES[name]))
    outcomes = await alternate(subjects, shares, budget=stage.plan.budget)
    await box.remove(force=True)
    peers = outcomes | {f"{name} exec": outcome for name, outcome in stage.missing().items()}
    return compare(Quantity("exec", "run `true` in a running box", "ms", 1e3), peers.pop("hutch"), peers, _GOALS)
