"""Fetching and unpacking an image of about 60 MB from a registry on the loopback interface.

Nothing is deleted before the end of the run: when ext4 makes a file it passes over the inodes that were deleted in the
last minute, one by one, so whoever came after a deletion would pay for it.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import TYPE_CHECKING

import hutch
from bench import images
from bench.peers.docker import Docker
from bench.peers.podman import Podman
from bench.peers.umoci import SkopeoUmoci
from bench.rows import Goal, Quantity, Row, compare
from bench.samples import alternate

if TYPE_CHECKING:
    from bench.peers.base import Puller
    from bench.samples import Subject
    from bench.stage import Stage

_GOALS: dict[str | None, Goal] = {"skopeo + umoci": Goal("faster", "ratio", at_least=1)}


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of pulling."""
    layout = images.debian()
    rounds = min(stage.plan.repeats, images.VARIANTS)
    references = [stage.registry.push(layout, str(number)) for number in range(1, rounds + 1)]

    def ours() -> Subject:
        homes = itertools.count()

        async def pull() -> float:
            number = next(homes)
            os.sync()  # what the one before left to be written is not our load
            async with hutch.Runtime.local(stage.folder / f"pull-{number}") as runtime:
                began = time.perf_counter()
                await runtime.images.pull(references[number])
                return time.perf_counter() - began

        return pull

    def theirs(peer: Puller) -> Subject:
        rest = iter(references)

        def pull() -> float:
            os.sync()
            return peer.pull(next(rest))

        return stage.measured(pull)

    pair = SkopeoUmoci(stage.folder / "skopeo-umoci")
    subjects: dict[str, Subject] = {"hutch": ours(), pair.name: theirs(pair)}
    for name, peer in stage.peers.items():
        if isinstance(peer, Docker | Podman):
            subjects[f"{name} pull"] = theirs(peer)
    budget = stage.plan.budget * 2
    outcomes = await alternate(subjects, dict.fromkeys(subjects, rounds), warm_up=0, budget=budget)
    missing = stage.missing().items()
    peers = outcomes | {f"{name} pull": outcome for name, outcome in missing if name in ("docker", "podman")}
    return compare(Quantity("pull", "pull and unpack a minimal Debian", "s"), peers.pop("hutch"), peers, _GOALS)
