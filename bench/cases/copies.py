"""Copying a big file into a box and out of it."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from bench.peers.docker import Docker
from bench.peers.podman import Podman
from bench.rows import Quantity, Row, compare
from bench.samples import alternate

if TYPE_CHECKING:
    from bench.samples import Subject
    from bench.stage import Stage


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of files, in MB/s of 10⁶ bytes."""
    size = stage.plan.file_mib << 20
    source, target = stage.folder / "file", stage.folder / "back"
    with source.open("wb") as file:
        for _ in range(stage.plan.file_mib):
            file.write(os.urandom(1 << 20))
    box = await stage.runtime.create(stage.image)
    await box.run("true")

    async def put() -> None:
        await box.files.put(source, "/copy")

    async def get() -> None:
        target.unlink(missing_ok=True)
        await box.files.get("/copy", target)

    copiers = {name: peer for name, peer in stage.peers.items() if isinstance(peer, Docker | Podman)}
    on_host = stage.timed(lambda: shutil.copyfile(source, target))
    puts: dict[str, Subject] = {"hutch": put, "shutil.copyfile": on_host}
    gets: dict[str, Subject] = {"hutch": get, "shutil.copyfile": on_host}
    for name, peer in copiers.items():
        puts[f"{name} cp"] = stage.measured(lambda peer=peer: peer.put(source))  # type: ignore[misc]  # a bound default
        gets[f"{name} cp"] = stage.measured(lambda peer=peer: peer.get(target))  # type: ignore[misc]  # likewise
    rows: list[Row] = []
    missing = {f"{name} cp": outcome for name, outcome in stage.missing().items() if name in ("docker", "podman")}
    for title, subjects in (("into a box", puts), ("out of a box", gets)):
        outcomes = await alternate(subjects, dict.fromkeys(subjects, stage.plan.repeats), budget=stage.plan.budget)
        for outcome in outcomes.values():
            outcome.samples = [size / seconds for seconds in outcome.samples]
        peers = outcomes | missing
        what = Quantity("files", f"copy a file of {stage.plan.file_mib} MiB {title}", "MB/s", 1e-6, more_is_better=True)
        rows += compare(what, peers.pop("hutch"), peers)
    if source.read_bytes() != target.read_bytes():
        raise RuntimeError("the file that came back differs")
    await box.remove(force=True)
    return rows
