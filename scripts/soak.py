"""The soak: mixed load on API and runner for a long time, whose memory and descriptors must stay flat.

usage: soak.py [--minutes N] [--seed N]

Commands with short and long output and input, boxes that come and go, files in and out, and commands of a plain REST
client run all the time, through fault proxies that cut connections of both hops. In the first fifth of the time API and
runner are killed (SIGKILL) and started again in turn; what they refuse meanwhile is counted, but no output may be
wrong, and no command run twice.

Flat means, for each of the two processes: over the last half of the time (the server keeps what ended for ten minutes,
so that the first half fills its records) the median resident memory of the last third is at most 5 % + 4 MiB above that
of the first third, and the median number of descriptors at most 8; and within a minute after the load no more than 8
descriptors above the number before it are open, and no box is left. Runs of less than ten
minutes are not judged by growth.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anyio
import httpx2
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

sys.path.insert(0, str(Path(__file__).parents[1]))

import hutch
from hutch.errors import HutchError, NotFoundError, UpstreamUnavailableError
from tests.e2e.fleet import KEY, Chain, joined
from tests.remote.faultproxy import Fault, random_cuts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hutch.sdk.remote import RemoteRuntime
    from hutch.sdk.remote_box import RemoteBox
    from tests.remote.processes import Process

IMAGE = "busybox"
NUMBERS = b"".join(b"%d\n" % number for number in range(300_000))
SHARE = 0.1
PATIENCE = 120.0
# In less time the processes have hardly warmed up.
SHORTEST_TO_JUDGE = 600.0
# A process that was killed is back by then.
GRACE = 30.0
SPARE_DESCRIPTORS = 8
SPARE_MEMORY = 4 << 20


class Sample(NamedTuple):
    """What a process uses; ``at`` in seconds from the start."""

    at: float
    pid: int
    rss: int
    descriptors: int


def measure(process: Process, at: float) -> Sample | None:
    """Look at a process; ``None`` while it is being started again."""
    try:
        pid = process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return Sample(at, pid, pages * os.sysconf("SC_PAGE_SIZE"), sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))
    except (AssertionError, OSError):
        return None


class Soak:
    """One run."""

    def __init__(self, chain: Chain, runtime: RemoteRuntime, seconds: float, seed: int) -> None:
        self.chain = chain
        self.runtime = runtime
        self.seconds = seconds
        self.killing = seconds / 5
        self.chance = random.Random(seed)
        self.done: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.samples: dict[str, list[Sample]] = {"API": [], "runner": []}
        self.began = anyio.current_time()
        self.count = 0

    @property
    def at(self) -> float:
        """Seconds from the start."""
        return anyio.current_time() - self.began

    async def run(self, box: RemoteBox) -> None:
        """Load until the time is over."""
        await box.files.write("/numbers", NUMBERS)
        self.chain.front.choose = random_cuts(self.chance.randrange(1 << 32), share=SHARE)
        self.chain.back.choose = random_cuts(self.chance.randrange(1 << 32), share=SHARE)
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(self._repeat, "command", lambda: self._command(box))
            tasks.start_soon(self._repeat, "input", lambda: self._input(box))
            tasks.start_soon(self._repeat, "file", lambda: self._file(box))
            tasks.start_soon(self._repeat, "plain", lambda: self._plain(box))
            tasks.start_soon(self._repeat, "box", self._box)
            tasks.start_soon(self._kill)
            tasks.start_soon(self._watch)
        self.chain.front.choose = self.chain.back.choose = Fault
        ran = collections.Counter((await box.files.read("/ran")).split())
        if twice := [number for number, times in ran.items() if times > 1]:
            self.wrong.append(f"commands run twice: {twice[:10]}")

    async def settle(self, before: dict[str, Sample]) -> list[str]:
        """What is not as it was, a minute at most after the load."""
        problems: list[str] = []
        for _ in range(60):
            problems = [f"left behind: box {info.id}" for info in await self.runtime.list()]
            for name, process in self.processes.items():
                now = measure(process, self.at)
                if now is None or now.descriptors > before[name].descriptors + SPARE_DESCRIPTORS:
                    problems.append(f"{name}: {now and now.descriptors} descriptors, {before[name].descriptors} before")
            if not problems:
                break
            await anyio.sleep(1)
        return problems

    def judge(self) -> list[str]:
        """What is not flat."""
        problems = []
        for name, samples in self.samples.items():
            late = [sample for sample in samples if sample.at > self.seconds / 2]
            third = len(late) // 3
            if third == 0 or len({sample.pid for sample in late}) > 1:
                problems.append(f"{name}: there is nothing to compare")
                continue
            first, last = late[:third], late[-third:]
            rss = [statistics.median(sample.rss for sample in part) for part in (first, last)]
            fds = [statistics.median(sample.descriptors for sample in part) for part in (first, last)]
            print(f"{name}: {rss[0] / 2**20:.1f} → {rss[1] / 2**20:.1f} MiB, {fds[0]:g} → {fds[1]:g} descriptors")
            if rss[1] > rss[0] * 1.05 + SPARE_MEMORY:
                problems.append(f"{name}: memory grows")
            if fds[1] > fds[0] + SPARE_DESCRIPTORS:
                problems.append(f"{name}: descriptors grow")
        return problems

    @property
    def processes(self) -> dict[str, Process]:
        """By name."""
        return {"API": self.chain.api, "runner": self.chain.runner}

    # The load.

    async def _repeat(self, name: str, action: Callable[[], Awaitable[None]]) -> None:
        while self.at < self.seconds:
            try:
                with anyio.fail_after(PATIENCE):
                    await action()
                self.done[name] += 1
            except TimeoutError:
                self.wrong.append(f"{name}: hung at {self.at:.0f} s")
            except (HutchError, httpx2.HTTPError, WebSocketException, OSError) as error:
                self.refused[f"{name}: {type(error).__name__}"] += 1
                # Once nobody is killed any more, only what is made once may fail, with the connection that it is on.
                if self.at > self.killing + GRACE and name not in ("box", "plain"):
                    self.wrong.append(f"{name}: {type(error).__name__}: {error}")
                await anyio.sleep(0.1)

    def _check(self, what: str, got: object, expected: object) -> None:
        if got != expected:
            sizes = [len(value) if isinstance(value, bytes) else value for value in (got, expected)]
            self.wrong.append(f"{what} at {self.at:.0f} s: {sizes[0]} instead of {sizes[1]}")

    async def _command(self, box: RemoteBox) -> None:
        self.count += 1
        number, size = self.count, self.chance.choice((0, 10, 1000, 100_000, 1_500_000))
        code = number % 100
        result = await box.run("sh", "-c", f"echo {number} >>/ran; head -c {size} /numbers; exit {code}")
        self._check("stdout", result.stdout, NUMBERS[:size])
        self._check("exit code", (result.exit_code, result.truncated), (code, False))

    async def _input(self, box: RemoteBox) -> None:
        data = NUMBERS[: self.chance.choice((10, 100_000, 1_000_000))]
        result = await box.run("cat", input=data)
        self._check("input", result.stdout, data)

    async def _file(self, box: RemoteBox) -> None:
        data = NUMBERS[: self.chance.choice((0, 5000, 500_000))]
        await box.files.write("/file", data)
        self._check("file", await box.files.read("/file"), data)

    async def _box(self) -> None:
        made = await self.runtime.create(IMAGE, labels={"soak": "yes"})
        try:
            self._check("new box", (await made.run("echo", "new")).stdout, b"new\n")
        finally:
            with anyio.CancelScope(shield=True):
                await self._remove(made.id)

    async def _remove(self, box_id: str) -> None:
        while True:
            try:
                await self.runtime.remove(box_id, force=True)
                return
            except NotFoundError:
                return
            except HutchError:  # lost with its connection: once more
                await anyio.sleep(0.2)

    async def _plain(self, box: RemoteBox) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        path = f"/v1/boxes/{box.id}"
        found = bytearray()
        async with httpx2.AsyncClient(base_url=self.chain.api.url, headers=headers, timeout=30) as http:
            body = {"command": "head", "args": ["-c", "50000", "/numbers"]}
            answer = await http.post(f"{path}/exec", json=body)
            if answer.status_code != 201:
                raise UpstreamUnavailableError(answer.text)
            url = f"{self.chain.api.url.replace('http', 'ws')}{path}/executions/{answer.json()['execution_id']}/attach"
            exit_code = None
            try:
                async with connect(url, additional_headers=headers, open_timeout=30) as socket:
                    while True:
                        frame = await socket.recv()
                        if isinstance(frame, str):
                            exit_code = json.loads(frame).get("exit_code", exit_code)
                        else:
                            found += frame[1:]
            except ConnectionClosed:
                pass
        if exit_code is None:
            raise UpstreamUnavailableError("the connection was lost")
        self._check("plain", bytes(found), NUMBERS[:50_000])

    async def _kill(self) -> None:
        while self.at < self.killing:
            for process in self.processes.values():
                await anyio.sleep(self.chance.uniform(0.02, 0.08) * self.killing)
                await anyio.to_thread.run_sync(self._kill_and_start, process)
                self.done["kill"] += 1
                async with hutch.Runtime.connect(self.chain.api.url, KEY) as direct:
                    with contextlib.suppress(HutchError, TimeoutError):
                        await joined(direct)

    def _kill_and_start(self, process: Process) -> None:
        process.kill()
        process.start()

    async def _watch(self) -> None:
        while self.at < self.seconds:
            await anyio.sleep(self.seconds / 600)
            for name, process in self.processes.items():
                if (sample := measure(process, self.at)) is not None:
                    self.samples[name].append(sample)


async def main(seconds: float, seed: int) -> int:
    """Run the soak on a fresh fleet; returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="hutch-soak-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        home = folder / "home"
        async with hutch.Runtime.local(home) as local:
            await local.images.bootstrap("busybox", reference=IMAGE)
        async with (
            Chain(folder, home) as chain,
            hutch.Runtime.connect(chain.api.url, KEY) as direct,
            hutch.Runtime.connect(chain.front.url, KEY) as runtime,
        ):
            await (await direct.create(IMAGE)).remove()
            soak = Soak(chain, runtime, seconds, seed)
            before = {name: measure(process, 0.0) for name, process in soak.processes.items()}
            box = await runtime.create(IMAGE)
            await soak.run(box)
            await soak._remove(box.id)
            problems = soak.wrong + (soak.judge() if seconds >= SHORTEST_TO_JUDGE else [])
            problems += await soak.settle({name: sample for name, sample in before.items() if sample is not None})
            print(f"done: {dict(soak.done)}")
            print(f"refused: {dict(soak.refused)}; faults: {chain.front.faults} and {chain.back.faults}")
    for problem in problems[:20]:
        print(problem, file=sys.stderr)
    print(f"{seconds / 60:.1f} minutes, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(anyio.run(main, arguments.minutes * 60, arguments.seed))
