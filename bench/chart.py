"""The chart: one panel a question, one bar a tool, all drawn from the same rows as the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from bench.rows import Row

_OURS = "#0b6e4f"
_THEIRS = "#b8bfc6"
_INK = "#22272e"
_PANELS = (
    ("exec", "Run `true` in a running box", "ms, logarithmic; less is better"),
    ("create", "Create a box and run `true`", "ms, logarithmic; less is better"),
    ("throughput", "A command's output, read by the caller", "MB/s; more is better"),
    ("pull", "Pull and unpack a minimal Debian", "s; less is better"),
)
_LINEAR = ("throughput", "pull")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the chart as SVG. Panels without figures are left out."""
    panels = [(bars, title, unit, group) for group, title, unit in _PANELS if len(bars := _bars(rows, group)) > 1]
    if not panels:
        path.unlink(missing_ok=True)
        return
    heights = [len(bars) + 1.6 for bars, _, _, _ in panels]
    # Text stays text and ids stay the same, so that two charts can be compared line by line.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hutch", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(7.2, 0.27 * sum(heights) + 0.3), layout="constrained", facecolor="white")
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for axes, (bars, title, unit, group) in zip(grid[:, 0], panels, strict=True):
            _panel(axes, bars, title, unit, logarithmic=group not in _LINEAR)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _bars(rows: Sequence[Row], group: str) -> list[tuple[str, float]]:
    """The first quantity of the group: ours, then every peer that has a figure, best first."""
    mine = [row for row in rows if row.group == group]
    first = [row for row in mine if row.name == mine[0].name]
    if not first or first[0].value is None:
        return []
    peers = {row.peer: (row.peer_value, row.ratio) for row in first if row.peer and row.peer_value and row.ratio}
    ordered = sorted(peers.items(), key=lambda item: item[1][1])
    return [("hutch", first[0].value), *((name, value) for name, (value, _) in ordered)]


def _panel(axes: Axes, bars: list[tuple[str, float]], title: str, unit: str, *, logarithmic: bool) -> None:
    names, values = [name for name, _ in bars], [value for _, value in bars]
    colours = [_OURS if name == "hutch" else _THEIRS for name in names]
    drawn = axes.barh(names, values, color=colours, height=0.72, log=logarithmic)
    axes.bar_label(drawn, labels=[f" {value:.3g}" if value < 1000 else f" {value:.0f}" for value in values], color=_INK)
    axes.invert_yaxis()
    if logarithmic:
        axes.set_xlim(min(values) / 3, max(values) * 2.5)
    else:
        axes.set_xlim(0, max(values) * 1.12)
    axes.set_title(f"{title}  ({unit})", loc="left", fontsize=9.5, color=_INK)
    axes.tick_params(axis="y", length=0, colors=_INK)
    axes.get_xaxis().set_visible(False)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_THEIRS)
