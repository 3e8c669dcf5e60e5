"""The census: thousands of short executions, and not one may lose, cross or double a byte.

usage: census.py [--count N] [--image REFERENCE] [--isolation KIND] [--boxes N]

In each box half of them run one after the other, half eight at once, while two busy loops keep both cores occupied.
Each writes numbered lines and then a nonce of its own, this to both streams; what comes back must be equal to it. Each
leaves a mark in the box: none may be run twice. A loss *rate* is never accepted: one deviation fails.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

import hutch
import vmstore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hutch.sdk.base import Box

PARALLEL = 8
HANG_SECONDS = 60.0
# Sizes around the borders that matter: nothing, a line, a pipe's capacity, the agent's window.
SIZES = (0, 1, 20, 20, 20, 20, 4096, 65536, 70000, 600_000)


NUMBERS = b"".join(b"%d\n" % number for number in range(100_000))


async def census(box: Box, count: int, disturb: Callable[[], None] = lambda: None) -> list[str]:
    """Run ``count`` executions, each after a call of ``disturb``; returns a line for each that deviates."""
    failures: list[str] = []
    dice = random.Random(count)
    await box.files.write("/numbers", NUMBERS)

    async def one(number: int, size: int) -> None:
        nonce = secrets.token_hex(8)
        # The output ends with the nonce and the process ends right after it: the moment at which bytes get lost.
        script = f"echo {number} >>/ran; head -c {size} /numbers; echo {nonce}; echo {nonce} >&2; exit {number % 200}"
        disturb()
        try:
            with anyio.fail_after(HANG_SECONDS):
                result = await box.run("/bin/sh", "-c", script)
        except (TimeoutError, hutch.HutchError) as error:
            failures.append(f"execution {number}: {type(error).__name__}: {error}")
            return
        line = nonce.encode() + b"\n"
        expected = NUMBERS[:size] + line
        if (
            (result.stdout, result.stderr, result.exit_code) != (expected, line, number % 200)
            or result.truncated
            or result.dropped
        ):
            failures.append(
                f"execution {number}: {len(result.stdout)} of {len(expected)} bytes, "
                f"{len(result.stderr)} of {len(line)} on stderr, exit code {result.exit_code}"
                f"{', said to be incomplete' if result.truncated or result.dropped else ''}"
            )

    sequential = count // 2
    for number in range(sequential):
        await one(number, dice.choice(SIZES))
    limiter = anyio.CapacityLimiter(PARALLEL)

    async def limited(number: int, size: int) -> None:
        async with limiter:
            await one(number, size)

    async with anyio.create_task_group() as tasks:
        for number in range(sequential, count):
            tasks.start_soon(limited, number, dice.choice(SIZES))
    ran = sorted(int(mark) for mark in (await box.files.read("/ran")).split())
    if ran != list(range(count)):
        failures.append(f"{len(ran)} marks of {len(set(ran))} commands, of {count} that were started")
    return failures


@contextlib.contextmanager
def busy_cores(count: int = 2) -> Iterator[None]:
    """Keep cores busy meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


async def main(count: int, image: str | None, isolation: str, boxes: int) -> int:
    """Run the census on a fresh home; returns the exit code."""
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="hutch-census-") as home:
        vmstore.share(Path(home))
        async with hutch.Runtime.local(home) as runtime:
            if image is None:
                image = (await runtime.images.bootstrap("busybox")).references[0]

            async def one_box() -> None:
                async with await runtime.create(image, auto_remove=True, isolation=isolation) as box:
                    failures.extend(await census(box, count // boxes))

            started = time.monotonic()
            with busy_cores():
                async with anyio.create_task_group() as tasks:
                    for _ in range(boxes):
                        tasks.start_soon(one_box)
            seconds = time.monotonic() - started
    return report(count, failures, seconds)


def report(count: int, failures: list[str], seconds: float, more: str = "") -> int:
    """Say how a census ended; returns the exit code."""
    for line in failures[:20]:
        print(line, file=sys.stderr)
    print(f"{count} executions, {len(failures)} deviations, {seconds:.1f} s{more}")
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--image", help="an image with /bin/sh and head; default: a busybox made on the spot")
    parser.add_argument("--isolation", choices=("container", "vm"), default="container")
    parser.add_argument("--boxes", type=int, default=1, help="so many share the executions")
    arguments = parser.parse_args()
    sys.exit(anyio.run(main, arguments.count, arguments.image, arguments.isolation, arguments.boxes))
