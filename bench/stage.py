"""The stage of a run: a home of our own, a registry, the peers that could be started, the thread that drives them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio
import msgspec

import hutch
from bench import images, mounts
from bench.peers.docker import Docker
from bench.peers.oci import OciRuntime
from bench.peers.podman import Podman
from bench.samples import Outcome

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from bench.peers.base import Peer
    from bench.samples import Subject
    from hutch.runtime import LocalRuntime

T = TypeVar("T")


class Plan(msgspec.Struct, frozen=True):
    """How much is measured. ``rounds``: samples of cheap things; ``budget``: seconds a measurement may take."""

    rounds: int
    starts: int
    boxes: int
    records: int
    stream_mib: int
    file_mib: int
    repeats: int
    budget: float
    daemons: bool


FULL = Plan(
    rounds=1000,
    starts=200,
    boxes=200,
    records=10_000,
    stream_mib=1024,
    file_mib=100,
    repeats=5,
    budget=75.0,
    daemons=True,
)
QUICK = Plan(
    rounds=100, starts=20, boxes=20, records=2_000, stream_mib=256, file_mib=16, repeats=1, budget=6.0, daemons=False
)


@dataclass(slots=True)
class Stage:
    """See the module. ``absent``: the peers that cannot be measured, and why."""

    plan: Plan
    folder: Path
    registry: images.Registry
    image: str
    runtime: LocalRuntime
    peers: dict[str, Peer]
    absent: dict[str, str]
    thread: ThreadPoolExecutor

    async def on_thread(self, function: Callable[[], T]) -> T:
        """Call a blocking function in the peers' thread."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function)

    def timed(self, function: Callable[[], object]) -> Subject:
        """Make a subject of a blocking call: it is timed in the peers' thread, without the way there."""

        def measure() -> float:
            began = time.perf_counter()
            function()
            return time.perf_counter() - began

        return self.measured(measure)

    def measured(self, function: Callable[[], float]) -> Subject:
        """Make a subject of a blocking function that returns its own measurement."""

        async def subject() -> float:
            return await self.on_thread(function)

        return subject

    def missing(self) -> dict[str, Outcome]:
        """The outcomes of the absent peers."""
        return {name: Outcome(error=reason) for name, reason in self.absent.items()}


@contextlib.asynccontextmanager
async def open_stage(plan: Plan) -> AsyncIterator[Stage]:
    """Build the stage, and take it down without a trace."""
    folder = Path(tempfile.mkdtemp(prefix="hutch-bench-"))
    folder.chmod(0o711)  # box users must be able to pass
    thread = ThreadPoolExecutor(1, "peers", initializer=mounts.enter_private_namespace)
    try:
        with images.registry(folder / "registry") as registry:
            layout = images.busybox()
            image = registry.push(layout)
            rootfs = images.rootfs(layout, folder / "unpacked")
            candidates: list[Peer] = [OciRuntime(name, folder / name, rootfs) for name in ("crun", "runc")]
            if plan.daemons:
                candidates += [Podman(folder / "podman", image), Docker(folder / "docker", image)]
            async with hutch.Runtime.local(folder / "home") as runtime:
                stage = Stage(plan, folder, registry, image, runtime, {}, {}, thread)
                try:
                    for peer in candidates:
                        await _start(stage, peer)
                    if not plan.daemons:
                        stage.absent |= dict.fromkeys(("podman", "docker"), "left out of the quick run")
                    yield stage
                finally:
                    with anyio.CancelScope(shield=True):
                        for peer in candidates:
                            await stage.on_thread(peer.stop)
    finally:
        thread.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


async def _start(stage: Stage, peer: Peer) -> None:
    try:
        await stage.on_thread(peer.start)
    except Exception as error:  # whatever it is, it is reported in the peer's rows
        stage.absent[peer.name] = f"{type(error).__name__}: {error}"
    else:
        stage.peers[peer.name] = peer
