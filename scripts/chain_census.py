"""The census over the chain SDK → API → runner → box, while the connections of both hops break at random bytes.

usage: chain_census.py [--count N] [--seed N]

API and runner are processes of their own; a fault proxy stands before each. Of the connections half are cut or reset,
each at a byte of its own, all may be cut at any moment, and some are slow or pass a few bytes at a time. No command may
fail, hang, be run twice, or lose, cross or double a byte, and none of its results may say that it is incomplete.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

sys.path.insert(0, str(Path(__file__).parents[1]))

import hutch
from census import census, report
from tests.e2e.fleet import KEY, Chain
from tests.remote.faultproxy import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

IMAGE = "busybox"
# Of the connections so many break, and of these so many within a kilobyte: in a request, an answer, a handshake.
SHARE, EARLY = 0.5, 0.15
# So many commands have a connection of each hop cut while they run.
CUTS = 0.25


def bad_network(seed: int) -> Callable[[], Fault]:
    """A chooser of faults: breaks, and now and then latency, or slices of a few bytes."""
    chance = random.Random(seed)

    def choose() -> Fault:
        at = None
        if chance.random() < SHARE:
            at = int(1000 ** chance.random()) if chance.random() < EARLY else int(1000 * 300 ** chance.random())
        upwards = chance.random() < 0.2
        return Fault(
            kind=chance.choice(["cut", "reset"]),
            after=None if upwards else at,
            taken=None if at is None or not upwards else at // 8,
            slice=chance.choice([100, *[1 << 16] * 40]),
            latency=chance.choice([0.002, *[0.0] * 10]),
        )

    return choose


def cutter(chain: Chain, seed: int) -> Callable[[], None]:
    """Return what cuts now this connection, now that one, while a command runs."""
    chance = random.Random(seed)
    loop = asyncio.get_running_loop()

    def disturb() -> None:
        for proxy in (chain.front, chain.back):
            if chance.random() < CUTS:
                loop.call_later(0.05 * chance.random() ** 2, proxy.cut_one, chance)

    return disturb


async def main(count: int, seed: int) -> int:
    """Run the census on a fresh fleet; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="hutch-chain-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        home = folder / "home"
        async with hutch.Runtime.local(home) as local:
            await local.images.bootstrap("busybox", reference=IMAGE)
        async with Chain(folder, home) as chain, hutch.Runtime.connect(chain.front.url, KEY) as runtime:
            box = await runtime.create(IMAGE, auto_remove=True)
            await box.start()
            chain.front.choose, chain.back.choose = bad_network(seed), bad_network(seed + 1)
            started = time.monotonic()
            failures = await census(box, count, cutter(chain, seed))
            seconds = time.monotonic() - started
            chain.front.choose = chain.back.choose = Fault
            await box.remove(force=True)
            faults = chain.front.faults, chain.back.faults
    if min(faults) < count // 10:
        failures.append(f"the census was hardly disturbed: {faults[0]} and {faults[1]} faults")
    return report(count, failures, seconds, f"; {faults[0]} faults before the API, {faults[1]} before the runner")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(anyio.run(main, arguments.count, arguments.seed))
