"""The runtime of an API process: every box is on a runner, none is here. Implements `hutch.sdk.base.Runtime`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import anyio
import msgspec

from hutch.core import ids
from hutch.errors import (
    AlreadyExistsError,
    EngineError,
    HutchError,
    InvalidArgumentError,
    NotFoundError,
    RuntimeClosedError,
    UnsupportedError,
    UpstreamUnavailableError,
)
from hutch.fleet.library import FleetImages, FleetVolumes
from hutch.fleet.registry import Place, Registry
from hutch.fleet.runners import Runner, Runners
from hutch.runtime.bounds import NOT_PUBLISHED
from hutch.runtime.checks import check_name
from hutch.runtime.spec import build_spec, check_spec
from hutch.sdk.remote_http import ConnectionFailed
from hutch.types import BoxInfo, BoxSpec, BoxState

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Literal, Self

    from anyio.abc import TaskGroup, TaskStatus

    from hutch.fleet.wire import Registration
    from hutch.sdk.remote_box import RemoteBox
    from hutch.types import Progress

# A runner that has not told its boxes by then is left out of a list.
_LIST_SECONDS = 5.0


class FleetRuntime:
    """See the module. Use it as an async context manager. ``database``: the file of the registry."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self._closed = False
        # By the id of the box that is being made.
        self._making: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    async def __aenter__(self) -> Self:
        self.registry = Registry(self._database)
        self._root = anyio.create_task_group()
        await self._root.__aenter__()
        self._tasks: TaskGroup = await self._root.start(_hold_tasks)
        self.runners = Runners(self.registry, self._tasks)
        self.images = FleetImages(self.runners, self.registry)
        self.volumes = FleetVolumes(self.runners, self.registry)
        await self.runners.restore()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
        await self._root.__aexit__(None, None, None)

    async def close(self) -> None:
        """End all waits and release everything; the boxes go on. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._tasks.cancel_scope.cancel()
        self.registry.close()

    async def report(self, body: Registration) -> None:
        """Take a runner's report."""
        self._check_open()
        await self.runners.report(body)

    # Boxes.

    async def create(
        self,
        image: str | BoxSpec,
        *,
        pull: Literal["missing", "always", "never"] = "missing",
        progress: Callable[[Progress], None] | None = None,
        box_id: str | None = None,
        **fields: Any,
    ) -> RemoteBox:
        """Make a box on the runner with the fewest running boxes. Raises `EngineError` when none is there."""
        self._check_open()
        spec = image if isinstance(image, BoxSpec) else _spec(image, fields)
        check_spec(spec)
        if box_id is None:
            return await self._create(await self._choose(spec), spec, None, pull, progress)
        order = self._making.setdefault(ids.check_id(box_id), anyio.Lock())
        async with order:  # whoever asks for the same again waits for the outcome of the first
            runner = self._runner_of(box_id) or await self._choose(spec)
            return await self._create(runner, spec, box_id, pull, progress)

    async def _choose(self, spec: BoxSpec) -> Runner:
        if spec.name is not None:
            await self._check_name(spec.name)
        return self._place(spec)

    def _runner_of(self, box_id: str) -> Runner | None:
        try:
            place = self.registry.find(box_id)
        except NotFoundError:
            return None
        return self.runners.get(place.runner) if place.info.id == box_id else None

    async def _create(
        self,
        runner: Runner,
        spec: BoxSpec,
        box_id: str | None,
        pull: Literal["missing", "always", "never"],
        progress: Callable[[Progress], None] | None,
    ) -> RemoteBox:
        runner.running += 1  # until its next report
        spec = msgspec.structs.replace(spec, detach=True)
        try:
            return await runner.create(spec, pull=pull, progress=progress, box_id=box_id)
        except ConnectionFailed as error:
            runner.seen = float("-inf")
            raise EngineError(f"runner {runner.id} was lost while it made the box: {error}") from None

    async def get(self, box: str) -> RemoteBox:
        """Find a box by name, id or unambiguous prefix of the id. Raises `NotFoundError`."""
        self._check_open()
        place = self.registry.find(check_name("the name of a box", box))
        return self.runners.get(place.runner).handle(place.info)

    async def list(self, *, labels: Mapping[str, str] | None = None) -> builtins.list[BoxInfo]:
        """List all boxes, or those that have the labels; of one whose runner is away the state is unknown."""
        self._check_open()
        seen: dict[str, BoxInfo] = {}

        async def ask(runner: Runner) -> None:
            with anyio.move_on_after(_LIST_SECONDS):
                try:
                    infos = await runner.list()
                except HutchError:
                    return
                seen.update({info.id: info for info in infos})
                answered.add(runner.id)

        answered: set[str] = set()
        async with anyio.create_task_group() as tasks:
            for runner in self.runners.all():
                tasks.start_soon(ask, runner)
        found = []
        for place in self.registry.boxes():
            info = seen.get(place.info.id)
            if info is None and place.runner in answered:  # removed meanwhile
                continue
            found.append(info or msgspec.structs.replace(place.info, state=BoxState.UNKNOWN, pid=None))
        return [info for info in found if all(info.labels.get(key) == value for key, value in (labels or {}).items())]

    async def remove(self, box: str, *, force: bool = False) -> None:
        """Remove a box and all that it held. A running box needs ``force``."""
        await (await self.get(box)).remove(force=force)

    async def import_box(self, path: str | Path, *, name: str | None = None) -> RemoteBox:
        """Make a box from an archive, on the runner with the fewest running boxes."""
        self._check_open()
        if name is not None:
            await self._check_name(name)
        made = await self.runners.alive()[0].import_box(path, name=name)
        await made.detach()
        return made

    async def info(self) -> dict[str, object]:
        """Facts about the fleet."""
        from hutch import __version__

        self._check_open()
        boxes = await self.list()
        alive = [runner for runner in self.runners.all() if runner.alive]
        return {
            "version": __version__,
            "runners": len(self.runners.all()),
            "runners_alive": len(alive),
            # A box may come to any of them.
            "network": bool(alive) and all(runner.network for runner in alive),
            "isolation": "container",
            "boxes": len(boxes),
            "running": sum(box.state is BoxState.RUNNING for box in boxes),
        }

    # Private methods.

    def _place(self, spec: BoxSpec) -> Runner:
        volumes = self.registry.volumes()
        homes = set()
        for mount in spec.mounts:
            if mount.volume:
                if mount.volume not in volumes:
                    raise NotFoundError(f"volume {mount.volume!r} does not exist; create it first")
                homes.add(volumes[mount.volume])
        if len(homes) > 1:
            raise InvalidArgumentError("the volumes of the box are on several runners; a box has room for one runner's")
        there = [runner for runner in self.runners.alive() if not homes or runner.id in homes]
        for runner in there:
            if runner.publishes or not spec.network.ports:
                return runner
        if there:
            raise UnsupportedError(NOT_PUBLISHED)
        raise EngineError(f"the runner that holds the volumes of the box is away: {', '.join(homes)}")

    async def _check_name(self, name: str) -> None:
        """Raise `AlreadyExistsError` for a name that is taken by a box that still exists."""
        place: Place | None = self.registry.named(name)
        if place is None:
            return
        try:
            await self.runners.get(place.runner).handle(place.info).info()
        except NotFoundError:
            self.registry.remove_box(place.info.id)
            return
        except UpstreamUnavailableError:
            pass
        raise AlreadyExistsError(f"a box named {name!r} exists already; remove it or choose another name")

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeClosedError("the runtime is closed; use it inside `async with`")


def _spec(image: str, fields: dict[str, Any]) -> BoxSpec:
    defaults: dict[str, Any] = dict.fromkeys(
        ("command", "entrypoint", "env", "labels", "cpus", "memory_mib", "disk_gb")
    )
    return build_spec(image=image, **{**defaults, "pids": 4096, "mounts": (), "isolation": "auto", **fields})


async def _hold_tasks(*, task_status: TaskStatus[TaskGroup]) -> None:
    async with anyio.create_task_group() as tasks:
        task_status.started(tasks)
        await anyio.sleep_forever()
