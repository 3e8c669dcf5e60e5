"""A home with many records: whether what is over slows down what goes on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

import hutch
from bench.rows import Goal, Quantity, Row, compare
from bench.samples import alternate
from hutch.runtime.home import new_id
from hutch.types import BoxState

if TYPE_CHECKING:
    from pathlib import Path

    from bench.samples import Subject
    from bench.stage import Stage
    from hutch.runtime import LocalRuntime
    from hutch.runtime.box import LocalBox

_EMPTY = "the same in an empty home"
_AS_FAST: dict[str | None, Goal] = {_EMPTY: Goal("as fast as in an empty home", "ratio", at_least=0.8)}
_GROWS = ("list", "open the home")


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of a home with many stopped boxes beside those of one without, measured in turn."""
    paths = {"few": stage.folder / "home-few", "many": stage.folder / "home-many"}
    few = stage.plan.starts // 4
    rounds = {"run `true`": stage.plan.rounds // 2, "get a box by name": stage.plan.rounds // 2}
    async with hutch.Runtime.local(paths["few"]) as small, hutch.Runtime.local(paths["many"]) as big:
        subjects: dict[str, Subject] = {}
        for home, runtime in (("few", small), ("many", big)):
            box = await _furnish(stage, runtime, stage.plan.records if home == "many" else 0)
            subjects |= {
                f"{home} {name}": subject for name, subject in _subjects(stage, runtime, box, paths[home]).items()
            }
        names = [name.partition(" ")[2] for name in subjects if name.startswith("many")]
        wanted = {subject: rounds.get(subject.partition(" ")[2], few) for subject in subjects}
        outcomes = await alternate(subjects, wanted, budget=stage.plan.budget)
    rows: list[Row] = []
    for name in names:
        what = Quantity("records", f"{name}, with {stage.plan.records} stopped boxes recorded", "ms", 1e3)
        peers = {_EMPTY: outcomes[f"few {name}"]}
        rows += compare(what, outcomes[f"many {name}"], peers, {} if name in _GROWS else _AS_FAST)[1:]
    return rows


async def _furnish(stage: Stage, runtime: LocalRuntime, records: int) -> LocalBox:
    """Make one box that runs, and the records of many that do not."""
    await runtime.images.pull(stage.image)
    box = await runtime.create(stage.image, name="main")
    await box.run("true")
    pattern = runtime.store.get_box(box.id)
    assert pattern is not None
    spec = msgspec.structs.replace(pattern.spec, name=None)
    pattern = msgspec.structs.replace(pattern, state=BoxState.STOPPED, spec=spec, pid=None, stopped_at=time.time())
    for _ in range(records):
        runtime.store.add_box(msgspec.structs.replace(pattern, id=new_id()))
    return box


def _subjects(stage: Stage, runtime: LocalRuntime, box: LocalBox, path: Path) -> dict[str, Subject]:
    async def run() -> None:
        await box.run("true")

    async def create() -> float:
        began = time.perf_counter()
        other = await runtime.create(stage.image)
        await other.start()
        done = time.perf_counter() - began
        await other.remove(force=True)
        return done

    async def get() -> None:
        await runtime.get("main")

    async def list_all() -> None:
        await runtime.list()

    async def open_home() -> float:
        began = time.perf_counter()
        async with hutch.Runtime.local(path):
            return time.perf_counter() - began

    return {
        "run `true`": run,
        "create and start": create,
        "get a box by name": get,
        "list": list_all,
        "open the home": open_home,
    }
