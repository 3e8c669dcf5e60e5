"""The lives of the boxes of one home: start, stop, pause, use, end."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import anyio
import msgspec

from hutch.core import agentproto as proto
from hutch.core import lifecycle
from hutch.core.lifecycle import Event, Use
from hutch.errors import HutchError, InvalidStateError, RuntimeClosedError, StoppedError
from hutch.runtime.gatekeeper import is_served
from hutch.runtime.plan import plan
from hutch.runtime.records import ALIVE, title

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hutch.image import ImageStore
    from hutch.runtime.channel import AgentChannel
    from hutch.runtime.channels import Channels
    from hutch.runtime.disks import Disks
    from hutch.runtime.engines import Engines
    from hutch.runtime.execution import LocalExecution
    from hutch.runtime.gatekeeper import Gatekeeper
    from hutch.runtime.home import Home
    from hutch.runtime.records import Records
    from hutch.state import BoxRecord, Store
    from hutch.types import BoxSpec, NetBounds

MAIN = "main"
"""The execution id of a box's main command."""

MainWatcher = Callable[["AgentChannel"], AbstractAsyncContextManager[tuple[tuple[int, int], "LocalExecution | None"]]]
"""Makes, on the channel to a box that is being started, the execution that watches its main command; with the
terminal's size."""

# What a box gets beyond its grace time before its PID 1 is killed.
_STOP_MARGIN = 2.0


class Lives:
    """See the module."""

    def __init__(
        self,
        home: Home,
        store: Store,
        engines: Engines,
        records: Records,
        channels: Channels,
        images: ImageStore,
        disks: Disks,
        gatekeeper: Gatekeeper | None,
    ) -> None:
        """``gatekeeper``: ``None`` in the process that serves the network itself. ``prepare`` is to be set: what is
        done in a box that has just been started, before its main command."""
        self._home = home
        self._store = store
        self._engines = engines
        self._records = records
        self._channels = channels
        self._images = images
        self._disks = disks
        self._gatekeeper = gatekeeper
        self.prepare: Callable[[BoxRecord], Awaitable[None]] = _nothing
        # What boxes that are started get of the network at most; without it they keep what they had.
        self.bounds: NetBounds | None = None
        # Waits for the end of a box.
        self._parked: set[anyio.CancelScope] = set()

    # Start and stop.

    async def start(self, box_id: str) -> None:
        """Start a box and its main command. Nothing happens when it runs. Raises `InvalidStateError` when it is
        paused."""
        async with self._records.holding(box_id) as record:
            self._records.check_not_paused(record)
            await self._start(record, _unwatched)

    async def start_watched(self, box_id: str, watch: MainWatcher) -> None:
        """Start a box whose main command is watched from its first byte. Raises `InvalidStateError` when it runs
        already."""
        async with self._records.holding(box_id) as record:
            if record.state in ALIVE:
                raise InvalidStateError(f"box {title(record)} runs already; attach to it")
            await self._start(record, watch)

    async def stop(self, box_id: str, grace: float) -> None:
        """Stop a box: the stop signal, SIGKILL after ``grace`` seconds. Nothing happens when it does not run."""
        async with self._records.holding(box_id) as record:
            if record.state not in ALIVE:
                return
            record = self._records.follow(record, Event.STOP)
            with anyio.CancelScope(shield=True):
                if grace > 0:
                    if self._records.stays_paused(box_id):
                        with contextlib.suppress(HutchError):
                            await self._engines.of(record).thaw(self._home.box(box_id))
                    await self._ask_to_stop(record, grace)
                await self._engines.of(record).kill(self._home.box(box_id))
                await self._records.observed(record)

    async def pause(self, box_id: str) -> None:
        """Freeze a running box until `resume`, whoever asks for that. Nothing happens when it is paused. Raises
        `InvalidStateError` when it does not run."""
        async with self._records.holding_still(box_id) as (record, running):
            if not running:
                raise InvalidStateError(f"box {title(record)} does not run ({record.state})")
            self._home.pause_mark(box_id).touch()

    async def resume(self, box_id: str) -> None:
        """Let a paused box go on. Nothing happens when it runs. Raises `InvalidStateError` when it does not."""
        async with self._records.holding(box_id) as record:
            if record.state not in ALIVE:
                raise InvalidStateError(f"box {title(record)} does not run ({record.state})")
            self._home.pause_mark(box_id).unlink(missing_ok=True)
            with anyio.CancelScope(shield=True):
                await self._records.observed(record)

    async def detach(self, box_id: str) -> None:
        """Make the box one that goes on when the runtime that made it is closed."""
        async with self._records.holding(box_id) as record:
            spec = msgspec.structs.replace(record.spec, detach=True)
            self._store.save_box(msgspec.structs.replace(record, spec=spec))

    async def set_network(self, record: BoxRecord, spec: BoxSpec) -> None:
        """Give a box another specification of its network. The caller holds the lock. When this returns nothing that
        it forbids is possible any more; a `NetworkError` says that the box could not be told."""
        self._store.save_box(msgspec.structs.replace(record, spec=spec, updated_at=time.time()))
        served = is_served(spec) or is_served(record.spec)
        if served and self._gatekeeper is not None and record.state in ALIVE:
            await self._gatekeeper.sync(record.id)

    async def serve_network(self, record: BoxRecord) -> BoxRecord:
        """See to it that the network of a running box is served, if it has one; again, should that have been killed.
        Returns the record with the ports that were chosen. Raises `NetworkError`."""
        if self._gatekeeper is None or not is_served(record.spec):
            return record
        reply = await self._gatekeeper.sync(record.id)
        if reply.ports == record.published:
            return record
        record = msgspec.structs.replace(record, published=reply.ports)
        self._store.save_box(record)
        return record

    async def destroy(self, box_id: str) -> None:
        """End a box at once and release what its start took; for removal. The caller holds the lock."""
        engine, directory = self._engines.of_box(box_id)
        await engine.kill(directory)
        self._channels.forget(box_id)
        self._records.started.discard(box_id)

    async def wait_gone(self, box_id: str) -> None:
        """Wait until the box does not run. Raises `RuntimeClosedError`."""
        record = self._store.box(box_id)
        if record.state not in ALIVE:
            return
        observed = self._records.observe(record)
        if not observed.running or observed.pid is None:
            return
        with anyio.CancelScope() as scope:
            self._parked.add(scope)
            try:
                await _gone(observed.pid)
            finally:
                self._parked.discard(scope)
        if scope.cancelled_caught:
            raise RuntimeClosedError(f"the runtime was closed while box {title(record)} ran")

    async def channel(self, box_id: str, *, start: bool = True) -> AgentChannel:
        """Return a channel to a running box; start the box if that is due, once, however many callers race.

        Raises `StoppedError`, `InvalidStateError` or `NotFoundError` as the box's state demands.
        """
        if (channel := self._channels.find(box_id)) is not None:
            self._records.check_not_paused(self._channels.settings(box_id))
            return channel
        async with self._channels.connecting(box_id):
            if (channel := self._channels.find(box_id)) is not None:
                return channel
            record = await self._records.refresh(box_id)
            self._records.check_not_paused(record)
            match lifecycle.use(record.state, job=record.command is not None, auto_resume=record.spec.auto_resume):
                case Use.GO:
                    pass
                case Use.START if start:
                    await self._start_for_use(box_id)
                case Use.START:
                    raise InvalidStateError(f"box {title(record)} does not run ({record.state})")
                case Use.REFUSE_STOPPED:
                    raise StoppedError(f"box {title(record)} is {record.state}; start it, or make it with auto_resume")
                case Use.REFUSE_JOB:
                    raise StoppedError(
                        f"box {title(record)} is {record.state} and runs its own command; start it to run that again"
                    )
            return await self._channels.open(box_id)

    def close(self) -> None:
        """End all waits, close all channels."""
        for scope in self._parked:
            scope.cancel()
        self._channels.close()

    # Private methods.

    async def _start_for_use(self, box_id: str) -> None:
        async with self._records.holding(box_id) as record:
            if lifecycle.use(record.state, job=False, auto_resume=record.spec.auto_resume) is Use.REFUSE_STOPPED:
                raise StoppedError(f"box {title(record)} was stopped meanwhile")
            await self._start(record, _unwatched)

    async def _start(self, record: BoxRecord, watch: MainWatcher) -> None:
        engine, directory = self._engines.of(record), self._home.box(record.id)
        if record.state in ALIVE:
            return
        directory.mkdir(mode=0o711, exist_ok=True)
        if engine.observe(directory).running:  # whoever started it was killed before recording that
            await engine.kill(directory)
        before = record = await self._disks.settle(record)
        what = plan(record, self._home, self._store, self._images)
        for name in ("exit", "main.log.0", "main.log.1"):
            (directory / name).unlink(missing_ok=True)
        try:
            started = await engine.start(what)
            record = self._records.save(
                record,
                Event.STARTED,
                pid=started.pid,
                started_at=time.time(),
                stopped_at=None,
                exit_code=None,
                reason=None,
                unenforced=started.unenforced,
                published=(),
                bounds=self.bounds or record.bounds,
            )
            self._records.started.add(record.id)
            if what.saved is not None:  # its programs stand still until they have their network, whoever may die here
                record = self._records.save(record, Event.PAUSE)
            record = await self.serve_network(record)
            if record.sealed:
                await self._channels.open(record.id)
                await self.prepare(record)
            if what.saved is not None:
                await self._records.observed(record)
            elif record.command is not None:
                await self._start_main(record, watch)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await engine.kill(directory)
                self._channels.drop(record.id)
                if isinstance(error, Exception):
                    self._home.saved_memory(record.id).unlink(missing_ok=True)
                    self._records.save(
                        record, Event.START_FAILED, pid=None, stopped_at=time.time(), reason=str(error) or None
                    )
                else:  # whoever wanted the start has gone away: the box is as it was before
                    self._records.started.discard(record.id)
                    self._store.save_box(before)
            raise

    async def _start_main(self, record: BoxRecord, watch: MainWatcher) -> None:
        channel = await self._channels.open(record.id)
        command = record.command or ()
        async with watch(channel) as (size, execution):
            answer = await channel.request(
                lambda req: proto.start(
                    MAIN,
                    command,
                    req=req,
                    env={**record.env, **({"TERM": "xterm"} if record.spec.tty else {})},
                    cwd=record.workdir,
                    user=record.user,
                    tty=size if record.spec.tty else None,
                    stdin=record.spec.open_stdin,
                    main=True,
                    watch=execution is not None,
                ),
                command=command,
            )
            if execution is not None:
                execution.started(answer.pid if isinstance(answer, proto.Started) else 0, watched=True)

    async def _ask_to_stop(self, record: BoxRecord, grace: float) -> None:
        observed = self._records.observe(record)
        if observed.pid is None:
            return
        with anyio.move_on_after(grace + _STOP_MARGIN):
            with contextlib.suppress(HutchError):
                channel = await self._channels.open(record.id)
                await channel.request(lambda req: proto.poweroff(grace, record.stop_signal, req=req))
            await _gone(observed.pid)


async def _nothing(record: BoxRecord) -> None: ...


@contextlib.asynccontextmanager
async def _unwatched(channel: AgentChannel) -> AsyncIterator[tuple[tuple[int, int], None]]:
    yield (24, 80), None


async def _gone(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await anyio.wait_readable(fd)
    finally:
        os.close(fd)
