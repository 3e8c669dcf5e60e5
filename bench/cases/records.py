"""A home with many records: whether what is over slows down what goes on."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import msgspec

import hutch
from bench.rows import Goal, Quantity, Row, compare
from bench.samples import Outcome, alternate
from hutch.runtime.home import new_id
from hutch.types import BoxState

if TYPE_CHECKING:
    from bench.samples import Subject
    from bench.stage import Stage

_EMPTY = "the same in an empty home"
_AS_FAST: dict[str | None, Goal] = {_EMPTY: Goal("as fast as in an empty home", "ratio", at_least=0.8)}
_GROWS = ("list", "open the home")


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of a home with many stopped boxes beside those of one without."""
    few = await _latencies(stage, 0)
    many = await _latencies(stage, stage.plan.records)
    rows: list[Row] = []
    for name, outcome in many.items():
        what = Quantity("records", f"{name}, with {stage.plan.records} stopped boxes recorded", "ms", 1e3)
        goals = {} if name in _GROWS else _AS_FAST
        rows += compare(what, outcome, {_EMPTY: few[name]}, goals)[1:]
    return rows


async def _latencies(stage: Stage, records: int) -> dict[str, Outcome]:
    path = stage.folder / "records-home"
    try:
        async with hutch.Runtime.local(path) as runtime:
            await runtime.images.pull(stage.image)
            box = await runtime.create(stage.image, name="main")
            pattern = runtime.store.get_box(box.id)
            assert pattern is not None
            pattern = msgspec.structs.replace(
                pattern, state=BoxState.STOPPED, spec=msgspec.structs.replace(pattern.spec, name=None), started_at=1.0
            )
            for _ in range(records):
                runtime.store.add_box(msgspec.structs.replace(pattern, id=new_id()))

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

            subjects: dict[str, Subject] = {
                "run `true`": run,
                "create and start": create,
                "get a box by name": get,
                "list": list_all,
                "open the home": open_home,
            }
            rounds = {"run `true`": stage.plan.rounds // 2, "get a box by name": stage.plan.rounds // 2}
            few = max(3, stage.plan.starts // 10)
            outcomes = await alternate(
                subjects, {name: rounds.get(name, few) for name in subjects}, budget=stage.plan.budget
            )
            await box.remove(force=True)
            return outcomes
    finally:
        shutil.rmtree(path, ignore_errors=True)
