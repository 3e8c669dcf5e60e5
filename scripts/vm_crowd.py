"""Many VMs at once: they must all start, work at the same time, and fit into the machine's memory.

usage: vm_crowd.py [--count N] [--rounds N] [--image REFERENCE] [--isolation KIND]

All boxes are made at once; then each runs commands, all boxes at the same time, whose output must be what went in. The
figures: how long it took until all were up, what each box takes of the host's memory (its share of what several use),
and the least memory that the machine had left. It fails when anything deviates, or when less than `LEAST` was left.
"""

from __future__ import annotations

import argparse
import re
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

import hutch
import vmstore

if TYPE_CHECKING:
    from hutch.sdk.base import Box, Runtime

PATIENCE = 300.0
NUMBERS = b"".join(b"%d\n" % number for number in range(50_000))
_MIB = 1 << 20
LEAST = 512 * _MIB


def left() -> int:
    """What the machine can still give, in bytes."""
    found = re.search(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def taken(keeper: int) -> int:
    """The share of the host's memory of a process and those below it, in bytes."""
    size = 0
    for pid in (keeper, *map(int, Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split())):
        found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        size += int(found[1]) << 10 if found else 0
    return size


class Crowd:
    """The boxes, and what went wrong."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.boxes: list[Box] = []
        self.wrong: list[str] = []
        self.least = left()

    async def add(self, image: str, isolation: str) -> None:
        """Make a box and use it for the first time, which starts it."""
        box = await self.runtime.create(image, isolation=isolation)
        self.boxes.append(box)
        await self.use(box)

    async def use(self, box: Box) -> None:
        """Run a command that gives back what it gets."""
        nonce = secrets.token_hex(8)
        try:
            with anyio.fail_after(PATIENCE):
                result = await box.run("sh", "-c", f"cat > /f; cat /f; echo {nonce} >&2", input=NUMBERS)
        except (TimeoutError, hutch.HutchError) as error:
            self.wrong.append(f"box {box.id}: {type(error).__name__}: {error}")
            return
        if (result.stdout, result.stderr, result.exit_code) != (NUMBERS, f"{nonce}\n".encode(), 0):
            self.wrong.append(f"box {box.id}: {len(result.stdout)} bytes, {result.stderr!r}, {result.exit_code}")
        self.least = min(self.least, left())


async def main(count: int, rounds: int, image: str | None, isolation: str) -> int:
    """Run the crowd on a fresh home; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="hutch-crowd-") as home:
        vmstore.share(Path(home))
        async with hutch.Runtime.local(home) as runtime:
            if image is None:
                image = (await runtime.images.bootstrap("busybox")).references[0]
            crowd, before = Crowd(runtime), left()
            began = time.monotonic()
            async with anyio.create_task_group() as tasks:
                for _ in range(count):
                    tasks.start_soon(crowd.add, image, isolation)
            up = time.monotonic() - began
            for _ in range(rounds):
                async with anyio.create_task_group() as tasks:
                    for box in crowd.boxes:
                        tasks.start_soon(crowd.use, box)
            seconds = time.monotonic() - began
            infos = [await box.info() for box in crowd.boxes]
            each = [taken(info.pid) for info in infos if info.pid is not None]
            for box in crowd.boxes:
                await box.remove(force=True)
    if len(each) < count:
        crowd.wrong.append(f"only {len(each)} of {count} boxes run at the end")
    if crowd.least < LEAST:
        crowd.wrong.append(f"only {crowd.least // _MIB} MiB of the machine's memory were left")
    for problem in crowd.wrong[:20]:
        print(problem, file=sys.stderr)
    print(
        f"{count} boxes, {len(crowd.wrong)} problems, {seconds:.1f} s; all up after {up:.1f} s; "
        f"each takes {sum(each) / max(len(each), 1) / _MIB:.0f} MiB; "
        f"the machine had {before // _MIB} MiB left before, {crowd.least // _MIB} MiB at least"
    )
    return 1 if crowd.wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image", help="an image with /bin/sh; default: a busybox made on the spot")
    parser.add_argument("--isolation", choices=("container", "vm"), default="vm")
    arguments = parser.parse_args()
    sys.exit(anyio.run(main, arguments.count, arguments.rounds, arguments.image, arguments.isolation))
