"""Many boxes at once: how fast they start and go, what an idle one costs, whether their number slows things down."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio

from bench.peers.base import pss
from bench.rows import Goal, Quantity, Row, compare, single
from bench.samples import Outcome, alternate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from bench.samples import Subject
    from bench.stage import Stage
    from hutch.runtime.box import LocalBox

T = TypeVar("T")

_SIDE_BY_SIDE = 4
_MEMORY_UNIT = "KiB"
_MEMORY_LIMIT = Goal("at most 1 MiB", "value", at_most=1024)
_AS_FAST = Goal("as fast as with one", "ratio", at_least=0.8)


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of density."""
    count = stage.plan.boxes
    rows: list[Row] = []
    alone = await _start_one(stage)
    lonely = await _latencies(stage, alone)

    before = _available()
    began = time.perf_counter()
    boxes = [await _start_one(stage) for _ in range(count)]
    rate = count / (time.perf_counter() - began)
    goal = Goal("at least 50/s", "value", at_least=50)
    rows.append(single(Quantity("density", f"start {count} boxes, one after another", "boxes/s"), rate, goal))
    elapsed = await _elapsed(lambda: _together(boxes, _run_true, _SIDE_BY_SIDE))
    rows.append(single(Quantity("density", f"run `true` in each of {count}, {_SIDE_BY_SIDE} at a time", "s"), elapsed))
    # Once each was used: the connections of the library to its boxes are part of what they cost.
    per_box = (before - _available()) / count
    rows += await _memory(stage, boxes, per_box)
    crowded = await _latencies(stage, alone)
    for name, outcome in crowded.items():
        peers = {"the same with 1 box": lonely[name]}
        goals: dict[str | None, Goal] = {} if name == "list" else {"the same with 1 box": _AS_FAST}
        rows += compare(Quantity("density", f"{name}, with {count} boxes running", "ms", 1e3), outcome, peers, goals)[
            1:
        ]

    elapsed = await _elapsed(lambda: _together(boxes, _remove, _SIDE_BY_SIDE))
    goal = Goal("at most 5 s", "value", at_most=5)
    rows.append(
        single(Quantity("density", f"remove {count} running boxes, {_SIDE_BY_SIDE} at a time", "s"), elapsed, goal)
    )

    boxes = []

    async def one_more(_: int) -> None:
        boxes.append(await _start_one(stage))

    elapsed = await _elapsed(lambda: _together(list(range(count)), one_more, _SIDE_BY_SIDE))
    rows.append(
        single(Quantity("density", f"start {count} boxes, {_SIDE_BY_SIDE} at a time", "boxes/s"), count / elapsed)
    )
    elapsed = await _elapsed(lambda: _together(boxes, _remove, 1))
    rows.append(single(Quantity("density", f"remove {count} running boxes, one after another", "s"), elapsed))
    await alone.remove(force=True)
    return rows


async def _latencies(stage: Stage, box: LocalBox) -> dict[str, Outcome]:
    async def start_one() -> float:
        began = time.perf_counter()
        other = await _start_one(stage)
        done = time.perf_counter() - began
        await other.remove(force=True)
        return done

    async def list_all() -> None:
        await stage.runtime.list()

    async def run() -> None:
        await _run_true(box)

    subjects: dict[str, tuple[Subject, int]] = {
        "run `true`": (run, stage.plan.rounds // 2),
        "create and start": (start_one, stage.plan.starts // 4),
        "list": (list_all, stage.plan.starts // 4),
    }
    outcomes: dict[str, Outcome] = {}
    for name, (subject, rounds) in subjects.items():
        # Not in turn: a list of many boxes would leave cold caches to the others, and so count twice.
        outcomes |= await alternate({name: subject}, {name: rounds}, budget=stage.plan.budget)
    return outcomes


async def _memory(stage: Stage, boxes: list[LocalBox], per_box: float) -> list[Row]:
    ours, charged = Outcome(), Outcome()
    for box in boxes:
        info, stats = await box.info(), await box.stats()
        if info.pid is not None:
            ours.samples.append(pss(info.pid))
        if stats.memory_bytes is not None:
            charged.samples.append(stats.memory_bytes)
    idle: dict[str, Subject] = {name: stage.measured(peer.idle) for name, peer in stage.peers.items()}
    peers = await alternate(idle, dict.fromkeys(idle, stage.plan.repeats), warm_up=0) | stage.missing()
    kibi = 1 / 1024
    rows = compare(Quantity("memory", "processes of an idle box (PSS)", _MEMORY_UNIT, kibi), ours, peers)
    if charged.samples:
        rows += compare(Quantity("memory", "charged to an idle box's control group", _MEMORY_UNIT, kibi), charged, {})
    what = Quantity("memory", "drop of the host's available memory for an idle box", _MEMORY_UNIT, kibi)
    return [*rows, single(what, per_box, _MEMORY_LIMIT, note="kernel objects and the records of Hutch included")]


async def _start_one(stage: Stage) -> LocalBox:
    box = await stage.runtime.create(stage.image)
    await box.start()
    return box


async def _run_true(box: LocalBox) -> None:
    await box.run("true")


async def _remove(box: LocalBox) -> None:
    await box.remove(force=True)


async def _together(items: list[T], function: Callable[[T], Awaitable[None]], side_by_side: int) -> None:
    limiter = anyio.CapacityLimiter(side_by_side)

    async def one(item: T) -> None:
        async with limiter:
            await function(item)

    async with anyio.create_task_group() as tasks:
        for item in items:
            tasks.start_soon(one, item)


async def _elapsed(function: Callable[[], Awaitable[None]]) -> float:
    began = time.perf_counter()
    await function()
    return time.perf_counter() - began


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo says nothing about available memory")
