"""The results as JSON, as Markdown tables, and as a chart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from bench import chart
from bench.machine import Machine
from bench.rows import Row

if TYPE_CHECKING:
    from pathlib import Path

_TITLES = {
    "exec": "Running a command",
    "create": "Making a box",
    "throughput": "Output",
    "network": "Network",
    "rest": "Over REST",
    "density": "Many boxes",
    "vm": "Boxes with a kernel of their own",
    "memory": "Memory",
    "pull": "Images",
    "files": "Files",
    "start-up": "Start-up of the tool",
    "records": "Many records",
}

_HEAD = "| what | Hutch | peer | its figure | ratio | goal |"


class Results(msgspec.Struct, frozen=True):
    """A whole run. ``seconds``: how long it took; ``quick``: too few samples to quote."""

    machine: Machine
    rows: list[Row]
    seconds: float
    quick: bool


def write(results: Results, folder: Path) -> str:
    """Write ``latest.json``, ``latest.md`` and ``latest.svg`` into ``folder``; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest.json").write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    text = markdown(results)
    (folder / "latest.md").write_text(text)
    chart.draw(results.rows, folder / "latest.svg")
    return text


def markdown(results: Results) -> str:
    """Return the tables."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.peers.items() if version)
    place = f"{machine.cpu}, {machine.cores} cores, {machine.memory / 2**30:.0f} GiB{', virtual' * machine.virtual}"
    lines = [
        f"Measured on {machine.date}: {place}, Linux {machine.kernel}, {machine.distribution};",
        f"Python {machine.python}, {versions}.",
        "Medians; the ratio says how many times better Hutch is (below 1: worse).",
    ]
    if results.quick:
        lines += ["", "**A quick run: too few samples to quote.**"]
    for group, title in _TITLES.items():
        rows = [row for row in results.rows if row.group == group]
        if rows:
            lines += ["", f"### {title}", "", _HEAD, "|---|---:|---|---:|---:|---|"]
            lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def figure(value: float | None) -> str:
    """Return a number with about three significant digits."""
    if value is None:
        return "–"
    size = abs(value)
    return f"{value:.2f}" if size < 10 else f"{value:.1f}" if size < 100 else f"{value:.0f}"


def _line(row: Row) -> str:
    goal = row.goal or ""
    if row.goal and row.met is not None:
        goal += " ✓" if row.met else " ✗"
    ours = f"{figure(row.value)} {row.unit}" if row.value is not None else "–"
    theirs = f"{figure(row.peer_value)} {row.unit}" if row.peer_value is not None else ""
    if row.peer is not None and row.peer_value is None:
        theirs = "not measured"
    ratio = f"{figure(row.ratio)} ×" if row.ratio is not None else ""
    return f"| {row.name} | {ours} | {row.peer or ''} | {theirs} | {ratio} | {goal} |"
