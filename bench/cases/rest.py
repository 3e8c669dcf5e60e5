"""What the way over REST costs: a server in a process of its own, and our client here."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

import hutch
from bench.cases.streams import rate_to_writer
from bench.peers.base import PeerError, end_process
from bench.peers.docker import Docker
from bench.rows import Goal, Quantity, Row, compare
from bench.samples import Outcome, alternate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bench.peers.docker_api import DockerApi
    from bench.samples import Subject
    from bench.stage import Stage
    from hutch.sdk.base import Box, Runtime

_BLOCK = 1 << 16
_DOCKER = "docker API"
_READY = b"Hutch serves on "


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of what our client does over REST."""
    async with contextlib.AsyncExitStack() as parts:
        url = await parts.enter_async_context(_server(stage))
        far = await parts.enter_async_context(hutch.Runtime.connect(url))
        docker = stage.peers.get("docker")
        api = None
        if isinstance(docker, Docker):
            api = docker.api()
            parts.callback(api.close)
        near_box, far_box = await stage.runtime.create(stage.image), await far.create(stage.image)
        await near_box.start()
        await far_box.start()
        rows = await _commands(stage, near_box, far_box, api)
        rows += await _streams(stage, near_box, far_box, api)
        rows += await _starts(stage, far, api)
        await near_box.remove(force=True)
        await far_box.remove(force=True)
        return rows


@contextlib.asynccontextmanager
async def _server(stage: Stage) -> AsyncIterator[str]:
    """API and runner in one process, on the home of the run."""
    argv = [sys.executable, "-m", "hutch", "--home", str(stage.folder / "home"), "serve", "--port", "0"]
    process = await stage.on_thread(lambda: subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE))
    with process:
        assert process.stdout is not None
        try:
            line = await anyio.to_thread.run_sync(process.stdout.readline)
            if not line.startswith(_READY):
                raise RuntimeError(f"the server did not start: {line!r}")
            yield line.split()[-1].decode()
        finally:
            end_process(process)


async def _commands(stage: Stage, near_box: Box, far_box: Box, api: DockerApi | None) -> list[Row]:
    async def over(box: Box) -> None:
        await box.run("true")

    subjects: dict[str, Subject] = {"rest": lambda: over(far_box), "embedded": lambda: over(near_box)}
    shares = dict.fromkeys(subjects, stage.plan.rounds)
    if api is not None:
        subjects[_DOCKER] = stage.timed(lambda: api.execute(["true"]))
        shares[_DOCKER] = max(3, stage.plan.rounds // 10)
    outcomes = await alternate(subjects, shares, budget=stage.plan.budget)
    goals: dict[str | None, Goal] = {"embedded": Goal("at most 4 × embedded", "ratio", at_least=0.25)}
    what = Quantity("rest", "run `true` in a running box", "ms", 1e3)
    return compare(what, outcomes.pop("rest"), outcomes | _missing(api), goals)


async def _streams(stage: Stage, near_box: Box, far_box: Box, api: DockerApi | None) -> list[Row]:
    size = stage.plan.stream_mib << 20
    command = ("dd", "if=/dev/zero", f"bs={_BLOCK}", f"count={size // _BLOCK}")

    async def over(box: Box) -> float:
        return await rate_to_writer(box, command, size)

    def docker() -> float:
        assert api is not None
        began = time.perf_counter()
        if api.execute(command) < size:
            raise PeerError("output is missing")
        return size / (time.perf_counter() - began)

    subjects: dict[str, Subject] = {"rest": lambda: over(far_box), "embedded": lambda: over(near_box)}
    if api is not None:
        subjects[_DOCKER] = stage.measured(docker)
    outcomes = await alternate(subjects, dict.fromkeys(subjects, stage.plan.repeats), budget=stage.plan.budget)
    goals: dict[str | None, Goal] = {None: Goal("at least 300 MB/s", "value", at_least=300)}
    text = f"{stage.plan.stream_mib} MiB of output to a Python writer"
    what = Quantity("rest", text, "MB/s", 1e-6, more_is_better=True)
    return compare(what, outcomes.pop("rest"), outcomes | _missing(api), goals)


async def _starts(stage: Stage, far: Runtime, api: DockerApi | None) -> list[Row]:
    async def over(runtime: Runtime) -> float:
        began = time.perf_counter()
        box = await runtime.create(stage.image)
        await box.run("true")
        done = time.perf_counter() - began
        await box.remove(force=True)
        return done

    def docker() -> float:
        assert api is not None
        began = time.perf_counter()
        made = api.one_shot()
        done = time.perf_counter() - began
        api.remove(made)
        return done

    subjects: dict[str, Subject] = {"rest": lambda: over(far), "embedded": lambda: over(stage.runtime)}
    shares = dict.fromkeys(subjects, stage.plan.starts)
    if api is not None:
        subjects[_DOCKER] = stage.measured(docker)
        shares[_DOCKER] = max(2, stage.plan.starts // 10)
    outcomes = await alternate(subjects, shares, budget=stage.plan.budget)
    what = Quantity("rest", "create a box, run `true`", "ms", 1e3)
    return compare(what, outcomes.pop("rest"), outcomes | _missing(api))


def _missing(api: DockerApi | None) -> dict[str, Outcome]:
    return {} if api is not None else {_DOCKER: Outcome(error="there is no docker in this run")}
