"""The crash suite: kill -9 of a host process at random points; nothing may be left behind and nothing may be lost.

usage: crash.py [--rounds N] [--seed N] [--image REFERENCE] [--isolation KIND]

Each round a process of its own uses the home: it makes, starts, uses, pauses, snapshots, clones, stops and removes
boxes in a loop, in every second round with a volume, in the others with a fork (of VMs). It is killed after a random
time. Then a fresh process recovers the home, and:

- a detached box with a counting command, made before the first round, still runs, and re-attaching yields each of
its lines once, in order;
- every recorded box can be described, started, used and removed;
- after the removal no process, control group, mount, folder, frozen layer or lock of any box is left.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio

import hutch
import vmstore
from hutch.types import BoxState

# What the victim does until it is killed. Errors of races with its own earlier boxes are its own business.
VICTIM = """
import sys, anyio, hutch
async def main(home, image, isolation, mounted):
    mounts = [hutch.Mount(target="/volume", volume="shared")] if mounted else []
    async with hutch.Runtime.local(home) as runtime:
        print("ready", flush=True)
        while True:
            box = await runtime.create(image, labels={"by": "victim"}, isolation=isolation, mounts=mounts)
            print(box.id, flush=True)
            await box.run("sh", "-c", "echo data > /data; yes | head -c 300000")
            await box.pause()
            await box.resume()
            if mounted:
                await box.run("sh", "-c", "yes | head -c 300000 > /volume/$$; rm /volume/*")
            elif isolation == "vm":
                fork = await box.fork()
                print(fork.id, flush=True)
                await fork.run("cat", "/data")
                await fork.remove(force=True)
            await box.snapshots.create("one")
            copy = await box.clone()
            print(copy.id, flush=True)
            await copy.run("cat", "/data")
            await box.stop(timeout=1)
            await box.snapshots.create("two")
            await box.snapshots.restore("one")
            await box.start()
            await box.remove(force=True)
            await copy.remove(force=True)
anyio.run(main, *sys.argv[1:])
"""
COUNTER = "i=0; while :; do i=$((i+1)); echo $i; usleep 20000 2>/dev/null || sleep 1; done"
RECOVERY_SECONDS = {"container": 30.0, "vm": 90.0}
LONGEST = {"container": 0.4, "vm": 8.0}
"""Seconds after which the victim is killed at the latest: it comes that far in its loop."""


class Findings:
    """What is wrong, collected over all rounds."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def expect(self, condition: bool, text: str) -> None:
        """Note the text unless the condition holds."""
        if not condition:
            self.lines.append(text)


class Watch:
    """Follows the counting command across rounds, by its position."""

    def __init__(self, box: str, exec_id: str) -> None:
        self.box = box
        self.exec_id = exec_id
        self.position = 0
        self.data = b""

    async def look(self, runtime: hutch.Runtime, findings: Findings) -> None:
        """Attach where the last look ended, take what is new, and check that no line is missing or doubled."""
        box = await runtime.get(self.box)  # type: ignore[attr-defined]  # an entered runtime
        new = bytearray()
        arrived = anyio.Event()

        def take(data: bytes) -> None:
            new.extend(data)
            arrived.set()

        execution = await box.attach(self.exec_id, after=(self.position, 0), stdout=take)
        with anyio.move_on_after(5):
            await arrived.wait()
        findings.expect(bool(new), "the detached command does not write any more")
        findings.expect(
            execution.stdout.dropped == 0, f"{execution.stdout.dropped} bytes of the detached command were lost"
        )
        await execution.close()
        self.position += len(new)
        self.data += new

    def check(self, findings: Findings) -> None:
        """All lines, each once, in order."""
        lines = self.data.split(b"\n")[:-1]
        expected = [str(number).encode() for number in range(1, len(lines) + 1)]
        findings.expect(lines == expected, "the lines of the detached command have a hole or a double")


def crash(home: Path, image: str, isolation: str, mounted: bool, delay: float) -> set[str]:
    """Let the victim work for ``delay`` seconds after it is ready, and kill it. Returns the ids of its boxes."""
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, str(home), image, isolation, "mounted" if mounted else ""],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert victim.stdout is not None
    try:
        victim.stdout.readline()
        time.sleep(delay)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        said = victim.stdout.read().decode().split()
        victim.stdout.close()
    return set(said) | {path.name for path in (home / "boxes").iterdir()}


async def recover(home: Path, watch: Watch, findings: Findings, seconds: float) -> None:
    """Look at everything from a fresh runtime, and remove what the victim left."""
    with anyio.fail_after(seconds):
        async with hutch.Runtime.local(home) as runtime:
            await watch.look(runtime, findings)  # type: ignore[arg-type]
            for info in await runtime.list():
                if info.id == watch.box:
                    findings.expect(info.state is BoxState.RUNNING, f"the detached box is {info.state}")
                    continue
                box = await runtime.get(info.id)
                if info.state is BoxState.PAUSED:
                    await box.resume()
                await box.start()
                for folder in ("", *(mount.target for mount in info.mounts)):
                    result = await box.run("sh", "-c", f"echo alive > {folder}/alive; cat {folder}/alive")
                    findings.expect(
                        result.stdout == b"alive\n", f"box {info.id} does not work after the recovery: {result}"
                    )
                await box.remove(force=True)


def leftovers(home: Path, gone: set[str], *keep: str) -> list[str]:
    """What is there on this machine of boxes of this home, ``gone`` among them, other than ``keep``."""
    found = [str(path) for path in (home / "boxes").iterdir() if path.name not in keep]
    found += [str(path) for path in (home / "locks").iterdir() if path.name not in (*keep, "disks")]
    found += [str(path) for path in (home / "disks").iterdir()]
    for tree in (Path("/sys/fs/cgroup/hutch"), *Path("/sys/fs/cgroup").glob("*/hutch")):
        found += [str(tree / box) for box in gone - set(keep) if (tree / box).exists()]
    mounts = Path("/proc/self/mountinfo").read_text()
    found += [line for line in mounts.splitlines() if str(home) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            cwd = str((process / "cwd").readlink())
            groups = (process / "cgroup").read_text()
        except OSError:
            continue
        if any(f"/hutch/{box}" in groups for box in keep):
            continue
        if str(home).encode() in command or cwd.startswith(str(home)):
            found.append(f"process {process.name}: {command!r}")
    return found


async def main(rounds: int, seed: int, image: str | None, isolation: str) -> int:
    """Run the suite on a fresh home; returns the exit code."""
    findings = Findings()
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="hutch-crash-") as folder:
        home = Path(folder)
        vmstore.share(home)
        async with hutch.Runtime.local(home) as runtime:
            if image is None:
                image = (await runtime.images.bootstrap("busybox")).references[0]
            box = await runtime.create(image, name="counter", detach=True, isolation=isolation)
            execution = await box.exec("/bin/sh", "-c", COUNTER)
            watch = Watch(box.id, execution.id)
            await runtime.volumes.create("shared")
        gone: set[str] = set()
        for number in range(rounds):
            delay = dice.uniform(0, LONGEST[isolation])
            gone |= crash(home, image, isolation, number % 2 == 0, delay)
            before = len(findings.lines)
            try:
                await recover(home, watch, findings, RECOVERY_SECONDS[isolation])
            except Exception as error:
                findings.lines.append(f"the recovery failed: {error!r}")
            findings.lines += [f"left behind: {item}" for item in leftovers(home, gone, watch.box)]
            for line in findings.lines[before:]:
                print(f"round {number} (killed after {delay * 1000:.0f} ms): {line}", file=sys.stderr)
        watch.check(findings)
        async with hutch.Runtime.local(home) as runtime:
            await runtime.remove("counter", force=True)
        findings.lines += [f"left behind at the end: {item}" for item in leftovers(home, gone | {watch.box})]
    print(f"{rounds} rounds, {len(findings.lines)} findings, {len(watch.data)} bytes of the detached command seen once")
    return 1 if findings.lines else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--image", help="an image with /bin/sh; default: a busybox made on the spot")
    parser.add_argument("--isolation", choices=("container", "vm"), default="container")
    arguments = parser.parse_args()
    sys.exit(anyio.run(main, arguments.rounds, arguments.seed, arguments.image, arguments.isolation))
