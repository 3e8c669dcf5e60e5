"""The API's connections to its runners."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import anyio

from hutch.errors import EngineError, HutchError, UpstreamUnavailableError
from hutch.sdk.remote import RemoteRuntime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anyio.abc import TaskGroup, TaskStatus

    from hutch.fleet.registry import Registry
    from hutch.fleet.wire import Registration
    from hutch.sdk.remote_box import RemoteBox
    from hutch.types import BoxInfo

log = logging.getLogger("hutch.fleet")

# A runner that has not reported for so long gets no new boxes.
ALIVE_SECONDS = 7.0


class Runner(RemoteRuntime):
    """A runner's boxes, which the registry follows."""

    def __init__(self, registry: Registry, runner: str, url: str, token: str) -> None:
        super().__init__(url, token, patience=1.0)
        self.id = runner
        self.url = url
        self.token = token
        self.seen = float("-inf")
        self.running = 0
        self.network = False
        self.publishes = False
        self.done = anyio.Event()
        self._registry = registry

    @property
    def alive(self) -> bool:
        """Whether it reported lately."""
        return anyio.current_time() - self.seen < ALIVE_SECONDS

    def handle(self, info: BoxInfo) -> RemoteBox:
        """The one handle on a box, which is noted."""
        self._registry.save_box(info, self.id)
        return super().handle(info)

    def removed(self, box_id: str) -> None:
        """A box is gone."""
        super().removed(box_id)
        self._registry.remove_box(box_id)

    async def reconcile(self) -> None:
        """Learn what happened on the runner while we were away, and tell it what it missed."""
        await self.images.set_logins(self._registry.logins())
        there = {info.id: info for info in await self.list()}
        for place in self._registry.boxes(self.id):
            if place.info.id not in there:
                self._registry.remove_box(place.info.id)
        for info in there.values():
            try:
                self._registry.save_box(info, self.id)
            except HutchError as error:
                log.warning("box %s of runner %s cannot be reached through us: %s", info.id, self.id, error)


class Runners:
    """All runners that ever reported. ``tasks`` is where their connections live."""

    def __init__(self, registry: Registry, tasks: TaskGroup) -> None:
        self._registry = registry
        self._tasks = tasks
        self._runners: dict[str, Runner] = {}
        self._order = anyio.Lock()

    async def restore(self) -> None:
        """Connect to those that are known from before; whether they are alive their reports will tell."""
        for runner, url, token in self._registry.runners():
            await self._connect(runner, url, token)

    async def report(self, body: Registration) -> None:
        """Take a runner's report."""
        async with self._order:
            runner = self._runners.get(body.runner)
            if runner is None or (runner.url, runner.token) != (body.url, body.token):
                self._registry.save_runner(body.runner, body.url, body.token)
                runner = await self._connect(body.runner, body.url, body.token)
            if not runner.alive:
                await runner.reconcile()
            runner.seen = anyio.current_time()
            runner.running = body.running
            runner.network = body.network
            runner.publishes = body.publishes

    def get(self, runner: str) -> Runner:
        """The connection to a runner, whether it is alive or not. Raises `UpstreamUnavailableError`."""
        found = self._runners.get(runner)
        if found is None:
            raise UpstreamUnavailableError(f"runner {runner}, which holds the box, is not known; start it again")
        return found

    def alive(self) -> list[Runner]:
        """Those that may get boxes, the one with the fewest running boxes (of equals: with the fewest boxes) first.
        Raises `EngineError` when there is none."""
        found = sorted((r for r in self._runners.values() if r.alive), key=self._load)
        if not found:
            raise EngineError("no runner is there to hold a box; start one with 'hutch serve runner'")
        return found

    async def tell_logins(self) -> None:
        """Let all runners that are there know the logins at registries; others learn them when they report again."""
        for runner in self._runners.values():
            try:
                if runner.alive:
                    await runner.images.set_logins(self._registry.logins())
            except UpstreamUnavailableError:
                runner.seen = float("-inf")

    def all(self) -> Sequence[Runner]:
        """All of them."""
        return list(self._runners.values())

    def _load(self, runner: Runner) -> tuple[int, int]:
        return runner.running, self._registry.count(runner.id)

    async def _connect(self, runner: str, url: str, token: str) -> Runner:
        if (old := self._runners.pop(runner, None)) is not None:
            old.done.set()
        new = Runner(self._registry, runner, url, token)
        await self._tasks.start(_live, new)
        self._runners[runner] = new
        return new


async def _live(runner: Runner, *, task_status: TaskStatus[None]) -> None:
    async with runner:
        task_status.started()
        await runner.done.wait()
