"""How soon the library and the command line are there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers.base import call
from bench.rows import Goal, Quantity, Row, compare
from bench.samples import Outcome, alternate

if TYPE_CHECKING:
    from bench.samples import Subject
    from bench.stage import Stage

_IMPORT = Goal("at most 60 ms", "value", at_most=60)
_HELP = Goal("at most 150 ms", "value", at_most=150)
_EMBEDDED = "import hutch; import hutch.runtime"


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of start-up."""
    python = sys.executable
    programs = {
        "pass": [python, "-c", "pass"],
        "import": [python, "-c", "import hutch"],
        "embedded": [python, "-c", _EMBEDDED],
        "hutch --help": [str(Path(python).with_name("hutch")), "--help"],
    }
    for tool in ("docker", "podman", "crun", "runc"):
        if shutil.which(tool):
            programs[f"{tool} --help"] = [tool, "--help"]
    subjects: dict[str, Subject] = {}
    for name, argv in programs.items():
        subjects[name] = stage.timed(lambda argv=argv: call(argv))  # type: ignore[misc]  # a bound default
    count = max(5, stage.plan.starts // 5)
    outcomes = await alternate(subjects, dict.fromkeys(subjects, count), budget=stage.plan.budget)
    bare = outcomes.pop("pass")
    imported, embedded, helped = (outcomes.pop(name) for name in ("import", "embedded", "hutch --help"))
    rows = [
        *compare(Quantity("start-up", "import hutch", "ms", 1e3), _beyond(imported, bare), {}, {None: _IMPORT}),
        *compare(
            Quantity("start-up", "import hutch with the embedded runtime", "ms", 1e3), _beyond(embedded, bare), {}
        ),
    ]
    peers = {"python -c pass": bare, **outcomes}
    return rows + compare(Quantity("start-up", "hutch --help", "ms", 1e3), helped, peers, {None: _HELP})


def _beyond(outcome: Outcome, bare: Outcome) -> Outcome:
    """What an import adds to the interpreter's own start, sample by sample of the same round."""
    pairs = zip(outcome.samples, bare.samples, strict=False)
    return Outcome([with_it - without for with_it, without in pairs], outcome.error or bare.error)
