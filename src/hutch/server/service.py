"""What all handlers share: the boxes behind the server, their executions, their activity, the counters."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import anyio
import msgspec
from starlette.requests import HTTPConnection  # noqa: TC002  # FastAPI reads the annotation

from hutch.errors import HutchError, InvalidArgumentError, NotFoundError
from hutch.server import policy
from hutch.server.registry import Executions
from hutch.server.store import Marks
from hutch.server.transit import Transit
from hutch.server.tunnels import Tunnels
from hutch.types import BoxState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from anyio.abc import TaskGroup

    from hutch.sdk.base import Box, Runtime
    from hutch.server.attach import Attachment
    from hutch.server.settings import ServerSettings


_NETWORK_SECONDS = 5.0


class Counters(msgspec.Struct):
    """What this server has done since its start."""

    created: int = 0
    failed: int = 0
    stopped: int = 0
    commands: int = 0
    exec_errors: int = 0


class Timing(msgspec.Struct):
    """Milliseconds that the making and the first start of a box took."""

    create: int | None = None
    start: int | None = None


class Service:
    """See the module."""

    def __init__(self, backend: Runtime, settings: ServerSettings) -> None:
        self.backend = backend
        self.settings = settings
        self.transit = Transit(settings.state)
        self.counters = Counters()
        self.timings: dict[str, Timing] = {}
        # CPU seconds of a box at the last look: (when, how many).
        self.cpu: dict[str, tuple[float, float]] = {}
        # Clients of main commands that have not been started yet, by box.
        self.early: dict[str, Attachment] = {}
        self._has_network = False
        self._network_until = 0.0
        # Boxes that the idle policy is stopping; set when that is done.
        self._stopping: dict[str, anyio.Event] = {}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[TaskGroup]:
        """Hold the records open; background work goes to the task group, which ends with the server."""
        self.marks = Marks(self.settings.state, self.settings.database)
        try:
            async with anyio.create_task_group() as tasks:
                self.executions = Executions(self.settings, tasks)
                self.tunnels = Tunnels(self.backend, self.settings, self.marks.is_open, self.touch)
                self.tunnels.start(tasks)
                yield tasks
                tasks.cancel_scope.cancel()
        finally:
            self.marks.close()

    # Boxes.

    async def box(self, key: str) -> Box:
        """Find a box by its exact id or name. Raises `NotFoundError`."""
        try:
            box = await self.backend.get(key)
        except InvalidArgumentError as error:  # no box can have that name
            raise NotFoundError(f"box {key!r:.100} does not exist: {error}") from None
        if key not in (box.id, box.name):  # the beginning of an id is for people at a terminal, not for programs
            raise NotFoundError(f"box {key!r:.100} does not exist")
        return box

    async def box_for_use(self, key: str, *, active: bool = True) -> Box:
        """Find a box that a command or a transfer is about to use. That starts a box again that only the idle policy
        has stopped, and is activity; who only comes to look (not ``active``) has to do something first."""
        box = await self.box(key)
        if active:
            self.touch(box.id)
        while (stopping := self._stopping.get(box.id)) is not None:
            await stopping.wait()
        mark = self.marks.get(box.id)
        if mark is not None and mark.idle_stopped:
            info = await box.info()
            if info.state is not BoxState.STOPPED:
                self.marks.set_idle_stopped(box.id, False, time.time())
            elif info.command is None and policy.from_labels(info.labels).auto_resume:
                await self.start(box)
        return box

    async def start(self, box: Box) -> None:
        """Start a box."""
        begin = time.monotonic()
        client = self.early.get(box.id)
        try:
            await (box.start() if client is None else client.start_main())
        except HutchError:
            self.counters.failed += 1
            raise
        self.timings.setdefault(box.id, Timing()).start = int((time.monotonic() - begin) * 1000)
        self.touch(box.id)
        self.settle(box.id)

    async def stop_idle(self, box: Box, still_due: Callable[[], bool]) -> None:
        """Stop a box for the idle policy. A use that comes meanwhile waits, and then starts it again."""
        self._stopping[box.id] = anyio.Event()
        try:
            if still_due():
                self.marks.set_idle_stopped(box.id, True, time.time())
                await box.stop()
                self.box_ended(box.id)
        finally:
            self._stopping.pop(box.id).set()

    def settle(self, box_id: str) -> None:
        """The box was started or stopped on request: the idle policy has no part in its state any more."""
        mark = self.marks.get(box_id)
        if mark is not None and mark.idle_stopped:
            self.marks.set_idle_stopped(box_id, False, time.time())

    async def remove(self, box: Box, *, force: bool) -> None:
        """Remove a box and all that the server knows of it."""
        await box.remove(force=force)
        self.forget(box.id)

    def box_ended(self, box_id: str) -> None:
        """The box was stopped."""
        self.executions.box_ended(box_id)
        self.tunnels.revoke(box_id)

    def touch(self, box_id: str) -> None:
        """The box is used."""
        self.marks.touch(box_id, time.time())

    def forget(self, box_id: str) -> None:
        """The box is gone."""
        self.marks.forget(box_id)
        self.timings.pop(box_id, None)
        self.cpu.pop(box_id, None)
        self.executions.forget_box(box_id)
        self.tunnels.revoke(box_id)

    # The network.

    async def has_network(self) -> bool:
        """Whether boxes can have a network here, as far as was known in the last seconds."""
        now = time.monotonic()
        if now >= self._network_until:
            self._has_network = bool((await self.backend.info()).get("network"))
            self._network_until = now + _NETWORK_SECONDS
        return self._has_network


def service_of(connection: HTTPConnection) -> Service:
    """The service behind a request."""
    service = connection.app.state.service
    assert isinstance(service, Service)
    return service
