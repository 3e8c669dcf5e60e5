"""The soak of VMs: hundreds of boxes that are made, used and removed, after which the machine must be as before.

usage: vm_soak.py [--count N] [--minutes N] [--image REFERENCE] [--isolation KIND]

Two boxes at once are made, run commands and are removed; of ten, two have a volume, of which one is forked, one is
paused and one is stopped and started. What comes out must be what went in. After each two nothing of them may be left:
no process, control group, mount, folder, frozen layer or lock. And the figures must be flat, which means: the median of
the last third of the samples is above that of the first third (both after the first tenth, which warms up) by no more
than what stands in `SPARE`.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import msgspec

import hutch
import vmstore
from crash import leftovers
from hutch.host.proc import poll_until

if TYPE_CHECKING:
    from hutch.sdk.base import Box, Runtime

PARALLEL = 2
PATIENCE = 180.0
# Samples; with fewer the figures say nothing.
SHORTEST_TO_JUDGE = 50
NUMBERS = b"".join(b"%d\n" % number for number in range(50_000))
_MIB = 1 << 20


class Sample(msgspec.Struct, frozen=True):
    """Figures while there is no box. First what is this suite's own, then the whole machine's, on which others may be
    at work as well. Sizes in bytes."""

    resident: int
    descriptors: int
    threads: int
    children: int
    home: int
    files: int
    processes: int
    mounts: int
    groups: int
    used: int
    kernel: int


SPARE = Sample(
    resident=8 * _MIB,
    descriptors=2,
    threads=2,
    children=0,
    home=4 * _MIB,
    files=2,
    processes=60,
    mounts=20,
    groups=60,
    used=1024 * _MIB,
    kernel=64 * _MIB,
)
"""By how much each may rise. One left by each box would be above it after 150 boxes, but for memory of the machine:
there it is 3 MiB of each of 500."""
_BYTES = ("resident", "home", "used", "kernel")


def measure(home: Path) -> Sample:
    """Look at this process, the home and the machine."""
    status, memory = Path("/proc/self/status"), Path("/proc/meminfo")
    found = [Path(folder) / name for folder, _, names in os.walk(home) for name in names]
    children = [child for task in Path("/proc/self/task").iterdir() for child in _read(task / "children").split()]
    return Sample(
        resident=_field(status, "VmRSS") << 10,
        descriptors=sum(1 for _ in Path("/proc/self/fd").iterdir()),
        threads=_field(status, "Threads"),
        children=len(children),
        home=sum(path.lstat().st_blocks << 9 for path in found if path.exists()),
        files=len(found),
        processes=sum(1 for _ in Path("/proc").glob("[0-9]*")),
        mounts=len(_read(Path("/proc/self/mountinfo")).splitlines()),
        groups=sum(len(folders) for _, folders, _ in os.walk("/sys/fs/cgroup")),
        used=(_field(memory, "MemTotal") - _field(memory, "MemAvailable")) << 10,
        kernel=_field(memory, "SUnreclaim") << 10,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _field(path: Path, name: str) -> int:
    """A number of a file with lines of names and values."""
    found = re.search(rf"^{name}:\s+(\d+)", path.read_text(), re.MULTILINE)
    assert found is not None, (path, name)
    return int(found[1])


class Soak:
    """One run."""

    def __init__(self, runtime: Runtime, image: str, isolation: str) -> None:
        self.runtime = runtime
        self.image = image
        self.isolation = isolation
        self.gone: set[str] = set()
        self.wrong: list[str] = []

    async def cycle(self, number: int) -> None:
        """Make a box, use it, remove it."""
        mounts = [hutch.Mount(target="/volume", volume="shared")] if number % 10 in (0, 3) else []
        try:
            with anyio.fail_after(PATIENCE):
                box = await self.runtime.create(self.image, isolation=self.isolation, mounts=mounts)
                self.gone.add(box.id)
                await self._use(box, f"{mounts[0].target}/{box.id}" if mounts else "/data")
                match number % 10:
                    case 3 if self.isolation == "vm":
                        fork = await box.fork()
                        self.gone.add(fork.id)
                        await self._use(fork, f"{mounts[0].target}/{fork.id}")
                        await fork.remove(force=True)
                    case 5:
                        await box.pause()
                        await box.resume()
                        await self._use(box, "/data")
                    case 7:
                        await box.stop(timeout=1)
                        await box.start()
                        await self._use(box, "/data")
                await box.remove(force=True)
        except (TimeoutError, hutch.HutchError) as error:
            self.wrong.append(f"box {number}: {type(error).__name__}: {error}")

    async def _use(self, box: Box, path: str) -> None:
        nonce = secrets.token_hex(8)
        result = await box.run("sh", "-c", f"cat > {path}; cat {path}; rm {path}; echo {nonce} >&2", input=NUMBERS)
        if (result.stdout, result.stderr, result.exit_code) != (NUMBERS, f"{nonce}\n".encode(), 0):
            self.wrong.append(f"box {box.id}: {len(result.stdout)} bytes, {result.stderr!r}, {result.exit_code}")


def judge(samples: list[Sample]) -> list[str]:
    """Print the figures, and return which of them rise."""
    warm = samples[len(samples) // 10 :]
    third = len(warm) // 3
    problems = []
    for name in Sample.__struct_fields__:
        first, last = (statistics.median(getattr(one, name) for one in part) for part in (warm[:third], warm[-third:]))
        unit, factor = ("MiB", _MIB) if name in _BYTES else ("", 1)
        print(f"{name:>12}: {first / factor:10.1f} → {last / factor:10.1f} {unit}")
        if last > first + getattr(SPARE, name):
            problems.append(f"{name}: rises from {first:g} to {last:g}")
    return problems


async def main(count: int, minutes: float, image: str | None, isolation: str) -> int:
    """Run the soak on a fresh home; returns the exit code."""
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="hutch-soak-") as folder:
        home = Path(folder)
        vmstore.share_kernels(home)
        async with hutch.Runtime.local(home) as runtime:
            if image is None:
                image = (await runtime.images.bootstrap("busybox")).references[0]
            await runtime.volumes.create("shared")
            soak = Soak(runtime, image, isolation)
            began = time.monotonic()
            for number in range(0, count, PARALLEL):
                async with anyio.create_task_group() as tasks:
                    for one in range(number, min(number + PARALLEL, count)):
                        tasks.start_soon(soak.cycle, one)
                # What a kernel thread takes down may be there for a moment longer.
                if not await poll_until(lambda: not leftovers(home, soak.gone), 5):
                    soak.wrong += [f"left behind after box {number}: {item}" for item in leftovers(home, soak.gone)]
                samples.append(measure(home))
                if soak.wrong or time.monotonic() - began > minutes * 60:
                    break
            seconds = time.monotonic() - began
    problems = soak.wrong + (judge(samples) if len(samples) >= SHORTEST_TO_JUDGE else [])
    for problem in problems[:20]:
        print(problem, file=sys.stderr)
    print(f"{len(soak.gone)} boxes, {len(problems)} problems, {seconds:.1f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=60.0, help="make no more boxes after that time")
    parser.add_argument("--image", help="an image with /bin/sh; default: a busybox made on the spot")
    parser.add_argument("--isolation", choices=("container", "vm"), default="vm")
    arguments = parser.parse_args()
    sys.exit(anyio.run(main, arguments.count, arguments.minutes, arguments.image, arguments.isolation))
