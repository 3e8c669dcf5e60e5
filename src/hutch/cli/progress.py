"""Progress of long work on standard error: bars on a terminal, at most one line in a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from hutch.cli import output

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from hutch.types import Progress

_FINAL = ("done", "exists")


class Display:
    """A progress function: one bar an item. Rich is not imported before there is something to show.

    ``summary`` is the line for a pipe, printed at the end when any work was done.
    """

    def __init__(self, summary: str, *, quiet: bool = False) -> None:
        self._summary = summary
        self._quiet = quiet
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        # The sizes that were told: the last step of an item no longer tells it.
        self._totals: dict[str, int] = {}
        self._worked = False

    def __call__(self, step: Progress) -> None:
        """Show a step."""
        self._worked = self._worked or step.phase not in _FINAL
        if self._quiet or not sys.stderr.isatty():
            return
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        name = output.shorten(output.clean(output.short_digest(step.item) if step.item else "image"), 24)
        task = self._tasks.get(name)
        if task is None and step.phase == "done":
            return  # the image itself: it had no bar
        if task is None:
            task = self._tasks[name] = self._bars.add_task("", name=name, total=None)
        if step.total is not None:
            self._totals[name] = step.total
        total = self._totals.get(name)
        if step.phase in _FINAL:
            total = total or step.done or 1  # a bar without a size would go on pulsing
            self._bars.update(task, description=step.phase, completed=total, total=total)
        else:
            # What has no size is a moment on the way, not work to look back at.
            transient = step.phase == "resolve"
            self._bars.update(task, description=step.phase, completed=step.done, total=total, visible=not transient)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        elif self._worked and not self._quiet and kind is None:
            output.note(self._summary)


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.fields[name]}", markup=False),
        TextColumn("{task.description:<9}", markup=False),
        BarColumn(bar_width=32),
        DownloadColumn(),
        console=Console(stderr=True),
    )
