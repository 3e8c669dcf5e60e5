"""The census with the published client, over API and runner: without breaks, and with every third connection broken
between the end of the command and the exit frame, where that client asks how the command ended and does not come back.

usage: published_census.py [--count N]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import anyio

sys.path.insert(0, str(Path(__file__).parents[1]))

import hutch
from tests.e2e.fleet import KEY, Chain
from tests.server.test_boxlite import SCRIPT

IMAGE = "busybox:test"


async def main(count: int) -> int:
    """Run both on a fresh fleet; returns the exit code."""
    bad = 0
    with tempfile.TemporaryDirectory(prefix="hutch-published-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        home = folder / "home"
        async with hutch.Runtime.local(home) as local:
            await local.images.bootstrap("busybox", reference=IMAGE)
        async with Chain(folder, home) as chain:
            for case in ("census", "census_with_cuts"):
                began = time.monotonic()
                done = await anyio.run_process(
                    [sys.executable, SCRIPT, case, chain.api.url, str(count)],
                    env={**os.environ, "BOXLITE_API_KEY": KEY},
                    check=False,
                )
                passed = done.stdout == b"passed\n"
                bad += not passed
                print(
                    f"{case}: {count} executions, {'passed' if passed else 'FAILED'}, {time.monotonic() - began:.1f} s"
                )
                if not passed:
                    sys.stderr.buffer.write(done.stderr[-3000:])
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    sys.exit(anyio.run(main, parser.parse_args().count))
