"""``python -m bench``: measure, write the results, print the tables."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from bench import machine, report
from bench.cases import commands, copies, density, machines, network, pulls, records, rest, starts, streams, tool
from bench.rows import Quantity, Row, compare
from bench.samples import Outcome
from bench.stage import FULL, QUICK, open_stage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from bench.stage import Plan, Stage

_CASES: dict[str, Callable[[Stage], Awaitable[list[Row]]]] = {
    "pull": pulls.measure,
    "exec": commands.measure,
    "create": starts.measure,
    "throughput": streams.measure,
    "rest": rest.measure,
    "density": density.measure,
    "vm": machines.measure,
    "network": network.measure,
    "start-up": tool.measure,
    "files": copies.measure,
    "records": records.measure,
}


async def _run(plan: Plan, names: list[str]) -> list[Row]:
    rows: list[Row] = []
    async with open_stage(plan) as stage:
        for peer, reason in stage.absent.items():
            print(f"{peer}: not measured: {reason}", file=sys.stderr)
        for name in names:
            began = time.monotonic()
            try:
                rows += await _CASES[name](stage)
            except Exception as error:  # one broken measurement does not take the others with it, nor is it hidden
                rows += compare(Quantity(name, name, ""), Outcome(error=f"{type(error).__name__}: {error}"), {})
            print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    return rows


def main() -> int:
    """Run the benchmarks. Returns the exit code: 1 when one of ours could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure Hutch beside its peers.")
    parser.add_argument("--quick", action="store_true", help="few samples, no docker and podman")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"measure only these: {', '.join(_CASES)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.case) - set(_CASES):
        parser.error(f"there is no case {', '.join(sorted(unknown))}")
    # SIGTERM gets the same tidy end as an interrupt from the keyboard, in the background of a shell too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    facts = machine.describe()
    began = time.monotonic()
    rows = anyio.run(_run, QUICK if arguments.quick else FULL, arguments.case or list(_CASES))
    results = report.Results(facts, rows, round(time.monotonic() - began, 1), arguments.quick)
    print(report.write(results, arguments.output))
    broken = [row for row in rows if row.value is None]
    for row in broken:
        print(f"{row.name}: {row.note}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
