"""Fetching and unpacking an image of about 60 MB from a registry on the loopback interface."""

from __future__ import annotations

import os
import shutil
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
    from collections.abc import Callable

    from bench.samples import Subject
    from bench.stage import Stage

_GOALS: dict[str | None, Goal] = {"skopeo + umoci": Goal("faster", "ratio", at_least=1)}


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of pulling."""
    reference = stage.registry.push(images.debian())

    async def ours() -> float:
        home = stage.folder / "pull-home"
        os.sync()  # what the one before left to be written is not our load
        try:
            async with hutch.Runtime.local(home) as runtime:
                began = time.perf_counter()
                await runtime.images.pull(reference)
                return time.perf_counter() - began
        finally:
            shutil.rmtree(home, ignore_errors=True)

    pair = SkopeoUmoci(stage.folder / "skopeo-umoci")
    pulls = {pair.name: pair.pull} | {
        f"{name} pull": peer.pull for name, peer in stage.peers.items() if isinstance(peer, Docker | Podman)
    }
    subjects: dict[str, Subject] = {"hutch": ours}
    for name, pull in pulls.items():

        def theirs(pull: Callable[[str], float] = pull) -> float:
            os.sync()
            return pull(reference)

        subjects[name] = stage.measured(theirs)
    outcomes = await alternate(
        subjects, dict.fromkeys(subjects, stage.plan.repeats), warm_up=0, budget=stage.plan.budget
    )
    peers = outcomes | {
        f"{name} pull": outcome for name, outcome in stage.missing().items() if name in ("docker", "podman")
    }
    return compare(Quantity("pull", "pull and unpack a minimal Debian", "s"), peers.pop("hutch"), peers, _GOALS)
