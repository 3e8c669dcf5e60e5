"""The lives of the boxes of one home: start, stop, observe, recover, and the channels to those that run.

A change to one box is made under its lock file, so that any number of processes can share a home. The truth about a
running box is what the engine observes; records follow, here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from hutch.core import agentproto as proto
from hutch.core import lifecycle
from hutch.core.lifecycle import Event, Use
from hutch.core.policy import GATEWAY_ADDRESS
from hutch.engine.base import BoxPlan, Lower, MountPlan
from hutch.errors import (
    DatabaseError,
    HutchError,
    InvalidStateError,
    NotFoundError,
    RuntimeClosedError,
    StoppedError,
)
from hutch.host.files import locked
from hutch.runtime import logs
from hutch.runtime.bounds import network_of
from hutch.runtime.channel import AgentChannel
from hutch.runtime.gatekeeper import is_served
from hutch.types import BoxInfo, BoxState

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

    from hutch.engine.base import Observed
    from hutch.image import ImageStore
    from hutch.runtime.disks import Disks
    from hutch.runtime.engines import Engines
    from hutch.runtime.execution import LocalExecution
    from hutch.runtime.gatekeeper import Gatekeeper
    from hutch.runtime.home import Home
    from hutch.state import BoxRecord, Store
    from hutch.types import BoxSpec, NetBounds

log = logging.getLogger("hutch.runtime")

MAIN = "main"
"""The execution id of a box's main command."""

MainWatcher = Callable[["AgentChannel"], AbstractAsyncContextManager[tuple[tuple[int, int], "LocalExecution | None"]]]
"""Makes, on the channel to a box that is being started, the execution that watches its main command; with the
terminal's size."""

ALIVE = (BoxState.RUNNING, BoxState.STOPPING, BoxState.PAUSED, BoxState.UNKNOWN)
_LOCK_SECONDS = 120.0
# What a box gets beyond its grace time before its PID 1 is killed.
_STOP_MARGIN = 2.0


class Lives:
    """See the module."""

    def __init__(
        self,
        home: Home,
        store: Store,
        engines: Engines,
        images: ImageStore,
        disks: Disks,
        gatekeeper: Gatekeeper | None,
    ) -> None:
        """``gatekeeper``: ``None`` in the process that serves the network itself. ``prepare`` is to be set: what is
        done in a box that has just been started, before its main command."""
        self._home = home
        self._store = store
        self._engines = engines
        self._images = images
        self._disks = disks
        self._gatekeeper = gatekeeper
        self.prepare: Callable[[BoxRecord], Awaitable[None]] = _nothing
        # What boxes that are started get of the network at most; without it they keep what they had.
        self.bounds: NetBounds | None = None
        self._channels: dict[str, AgentChannel] = {}
        self._connecting: dict[str, anyio.Lock] = {}
        # Settings of boxes that were used through a channel: what an execution needs of the record.
        self._settings: dict[str, BoxRecord] = {}
        # Boxes that this process started.
        self.started: set[str] = set()
        # Waits for the end of a box.
        self._parked: set[anyio.CancelScope] = set()
        self._closed = False

    # Records.

    def record(self, box_id: str) -> BoxRecord:
        """Return a box's record as it stands. Raises `NotFoundError`."""
        record = self._store.get_box(box_id)
        if record is None:
            raise NotFoundError(f"box {box_id} does not exist; it may have been removed")
        return record

    def settings(self, box_id: str) -> BoxRecord:
        """Return the record of a box whose channel is open (it may lag behind in state, not in configuration)."""
        return self._settings.get(box_id) or self.record(box_id)

    async def info(self, box_id: str) -> BoxInfo:
        """Return a box's record and true state."""
        return describe(await self.refresh(box_id))

    async def refresh(self, box_id: str) -> BoxRecord:
        """Bring a record up to date with what the engine observes, and return it."""
        return await self.verified(self.record(box_id))

    async def verified(self, record: BoxRecord) -> BoxRecord:
        """`refresh` for a record that has just been read."""
        if record.state not in ALIVE:
            return record
        if (record.state is not BoxState.PAUSED or self._stays_paused(record.id)) and self._observe(record).running:
            return record
        async with self.holding(record.id) as current:
            return current

    async def settle_forsaken(self, box_id: str) -> None:
        """Set a frozen box going again, or finish its stop, if the process at it has died: then nobody holds the box.

        Raises `DeadlineError` when somebody does.
        """
        async with locked(self._home.lock(box_id), timeout=0):
            await self._observed(self.record(box_id))

    # Start and stop.

    async def start(self, box_id: str) -> None:
        """Start a box and its main command. Nothing happens when it runs. Raises `InvalidStateError` when it is
        paused."""
        async with self.holding(box_id) as record:
            self._check_not_paused(record)
            await self._start(record, _unwatched)

    async def start_watched(self, box_id: str, watch: MainWatcher) -> None:
        """Start a box whose main command is watched from its first byte. Raises `InvalidStateError` when it runs
        already."""
        async with self.holding(box_id) as record:
            if record.state in ALIVE:
                raise InvalidStateError(f"box {_name(record)} runs already; attach to it")
            await self._start(record, watch)

    async def stop(self, box_id: str, grace: float) -> None:
        """Stop a box: the stop signal, SIGKILL after ``grace`` seconds. Nothing happens when it does not run."""
        async with self.holding(box_id) as record:
            if record.state not in ALIVE:
                return
            record = self._follow(record, Event.STOP)
            with anyio.CancelScope(shield=True):
                if grace > 0:
                    if self._stays_paused(box_id):
                        with contextlib.suppress(HutchError):
                            await self._engines.of(record).thaw(self._home.box(box_id))
                    await self._ask_to_stop(record, grace)
                await self._engines.of(record).kill(self._home.box(box_id))
                await self._observed(record)

    async def pause(self, box_id: str) -> None:
        """Freeze a running box until `resume`, whoever asks for that. Nothing happens when it is paused. Raises
        `InvalidStateError` when it does not run."""
        async with self.holding_still(box_id) as (record, running):
            if not running:
                raise InvalidStateError(f"box {_name(record)} does not run ({record.state})")
            self._home.pause_mark(box_id).touch()

    async def resume(self, box_id: str) -> None:
        """Let a paused box go on. Nothing happens when it runs. Raises `InvalidStateError` when it does not."""
        async with self.holding(box_id) as record:
            if record.state not in ALIVE:
                raise InvalidStateError(f"box {_name(record)} does not run ({record.state})")
            self._home.pause_mark(box_id).unlink(missing_ok=True)
            with anyio.CancelScope(shield=True):
                await self._observed(record)

    async def detach(self, box_id: str) -> None:
        """Make the box one that goes on when the runtime that made it is closed."""
        async with self.holding(box_id) as record:
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
        self.drop_channel(box_id)
        self.started.discard(box_id)
        self._settings.pop(box_id, None)
        self._connecting.pop(box_id, None)

    async def wait_gone(self, box_id: str) -> None:
        """Wait until the box does not run. Raises `RuntimeClosedError`."""
        record = self.record(box_id)
        if record.state not in ALIVE:
            return
        observed = self._observe(record)
        if not observed.running or observed.pid is None:
            return
        with anyio.CancelScope() as scope:
            self._parked.add(scope)
            try:
                await _gone(observed.pid)
            finally:
                self._parked.discard(scope)
        if scope.cancelled_caught:
            raise RuntimeClosedError(f"the runtime was closed while box {_name(record)} ran")

    @contextlib.asynccontextmanager
    async def holding_stopped(self, box_id: str, what: str) -> AsyncIterator[BoxRecord]:
        """Hold the lock of a box that must not run. Raises `InvalidStateError` when it does."""
        async with self.holding(box_id) as record:
            if record.state in ALIVE:
                raise InvalidStateError(f"box {record.spec.name or record.id} runs; stop it before {what}")
            yield record

    @contextlib.asynccontextmanager
    async def holding_still(self, box_id: str, *, memory: Path | None = None) -> AsyncIterator[tuple[BoxRecord, bool]]:
        """Hold the lock of a box whose processes, if it runs, are frozen meanwhile. Yields (record, runs).
        ``memory``: a file into which the memory of a running box is saved; raises `InvalidStateError` when it is
        paused."""
        async with self.holding(box_id) as record:
            if record.state not in ALIVE:
                yield record, False
                return
            engine, directory = self._engines.of(record), self._home.box(box_id)
            if memory is not None:
                self._check_not_paused(record)
            # The record first: should we die while it is frozen, whoever holds the box next sets it going again.
            if record.state is not BoxState.PAUSED:
                record = self._save(record, Event.PAUSE)
            try:
                await (engine.freeze(directory) if memory is None else engine.save(directory, memory))
                yield record, True
            finally:
                with anyio.CancelScope(shield=True):
                    await self._observed(self.record(box_id))

    @contextlib.asynccontextmanager
    async def holding(self, box_id: str) -> AsyncIterator[BoxRecord]:
        """Hold the lock of a box, with its record as it truly is: no other process changes it meanwhile."""
        async with locked(self._home.lock(box_id), timeout=_LOCK_SECONDS):
            yield await self._observed(self.record(box_id))

    # Channels.

    def open_channel(self, box_id: str) -> AgentChannel | None:
        """Return the channel that is open, if one is."""
        channel = self._channels.get(box_id)
        return channel if channel is not None and not channel.closed else None

    async def channel(self, box_id: str, *, start: bool = True) -> AgentChannel:
        """Return a channel to a running box; start the box if that is due, once, however many callers race.

        Raises `StoppedError`, `InvalidStateError` or `NotFoundError` as the box's state demands.
        """
        if (channel := self.open_channel(box_id)) is not None:
            self._check_not_paused(self.settings(box_id))
            return channel
        async with self._connecting.setdefault(box_id, anyio.Lock()):
            if (channel := self.open_channel(box_id)) is not None:
                return channel
            record = await self.refresh(box_id)
            self._check_not_paused(record)
            match lifecycle.use(record.state, job=record.command is not None, auto_resume=record.spec.auto_resume):
                case Use.GO:
                    pass
                case Use.START if start:
                    await self._start_for_use(box_id)
                case Use.START:
                    raise InvalidStateError(f"box {_name(record)} does not run ({record.state})")
                case Use.REFUSE_STOPPED:
                    raise StoppedError(f"box {_name(record)} is {record.state}; start it, or make it with auto_resume")
                case Use.REFUSE_JOB:
                    raise StoppedError(
                        f"box {_name(record)} is {record.state} and runs its own command; start it to run that again"
                    )
            return await self._connect(box_id)

    async def reconnect(self, box_id: str, *, own: bool = False) -> AgentChannel | None:
        """Return a new channel after the old one was lost, ``None`` if the box does not run any more."""
        if self._closed:
            return None
        try:
            async with self._connecting.setdefault(box_id, anyio.Lock()):
                if not own and (channel := self.open_channel(box_id)) is not None:
                    return channel
                engine, directory = self._engines.of_box(box_id)
                if not engine.observe(directory).running:
                    return None
                return await (self.own_channel(box_id) if own else self._connect(box_id))
        except HutchError:
            return None

    async def own_channel(self, box_id: str) -> AgentChannel:
        """Return a new channel for one watcher alone, which closes it: on one channel each execution has one
        watcher."""
        return await AgentChannel.open(await self.connect(box_id))

    async def connect(self, box_id: str) -> socket.socket:
        """Return a new connection to a box's agent, as the engine gives it."""
        engine, directory = self._engines.of_box(box_id)
        return await engine.connect(directory)

    def drop_channel(self, box_id: str) -> None:
        """The box has ended: close the channel to it, once all that it said is read."""
        channel = self._channels.pop(box_id, None)
        if channel is not None:
            channel.drain()

    def close(self) -> None:
        """Close all channels."""
        self._closed = True
        for scope in self._parked:
            scope.cancel()
        for channel in list(self._channels.values()):
            channel.close(RuntimeClosedError("the runtime was closed"))
        self._channels.clear()

    # Private methods.

    async def _start_for_use(self, box_id: str) -> None:
        async with self.holding(box_id) as record:
            if lifecycle.use(record.state, job=False, auto_resume=record.spec.auto_resume) is Use.REFUSE_STOPPED:
                raise StoppedError(f"box {_name(record)} was stopped meanwhile")
            await self._start(record, _unwatched)

    async def _start(self, record: BoxRecord, watch: MainWatcher) -> None:
        engine, directory = self._engines.of(record), self._home.box(record.id)
        if record.state in ALIVE:
            return
        directory.mkdir(mode=0o711, exist_ok=True)
        if engine.observe(directory).running:  # whoever started it was killed before recording that
            await engine.kill(directory)
        before = record = await self._disks.settle(record)
        plan = self._plan(record, directory)
        for name in ("exit", "main.log.0", "main.log.1"):
            (directory / name).unlink(missing_ok=True)
        try:
            started = await engine.start(plan)
            record = self._save(
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
            self.started.add(record.id)
            if plan.saved is not None:  # its programs stand still until they have their network, whoever may die here
                record = self._save(record, Event.PAUSE)
            record = await self.serve_network(record)
            if record.sealed:
                await self._connect(record.id)
                await self.prepare(record)
            if plan.saved is not None:
                await self._observed(record)
            elif record.command is not None:
                await self._start_main(record, watch)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await engine.kill(directory)
                self.drop_channel(record.id)
                if isinstance(error, Exception):
                    self._save(record, Event.START_FAILED, pid=None, stopped_at=time.time(), reason=str(error) or None)
                else:  # whoever wanted the start has gone away: the box is as it was before
                    self.started.discard(record.id)
                    self._store.save_box(before)
            raise
        finally:
            self._home.saved_memory(record.id).unlink(missing_ok=True)

    async def _start_main(self, record: BoxRecord, watch: MainWatcher) -> None:
        channel = await self._connect(record.id)
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

    def _plan(self, record: BoxRecord, directory: Path) -> BoxPlan:
        image_layers: tuple[Lower, ...] = ()
        if record.image_digest:
            image = self._images.get(record.image_digest)
            image_layers = tuple(Lower(path) for path in self._images.layer_paths(image))
        return BoxPlan(
            box_id=record.id,
            directory=directory,
            lowers=tuple(self._home.lower(name) for name in record.disks) + image_layers,
            hostname=record.spec.hostname or record.spec.name or record.id,
            nameserver=GATEWAY_ADDRESS,
            limits=record.spec.limits,
            mounts=tuple(self._mount(record, index) for index in range(len(record.spec.mounts))),
            saved=saved if (saved := self._home.saved_memory(record.id)).exists() else None,
        )

    def _mount(self, record: BoxRecord, index: int) -> MountPlan:
        mount = record.spec.mounts[index]
        if mount.volume:
            volume = self._store.get_volume(mount.volume)
            if volume is None:
                raise NotFoundError(f"volume {mount.volume!r} of box {_name(record)} does not exist any more")
            source = self._home.volume(volume.id)
        else:
            source = Path(mount.source)
        return MountPlan(source=source, target=mount.target, read_only=mount.read_only)

    async def _connect(self, box_id: str) -> AgentChannel:
        if (channel := self.open_channel(box_id)) is not None:
            return channel
        channel = await self.own_channel(box_id)
        self._channels[box_id] = channel
        self._settings[box_id] = self.record(box_id)
        return channel

    async def _ask_to_stop(self, record: BoxRecord, grace: float) -> None:
        observed = self._observe(record)
        if observed.pid is None:
            return
        with anyio.move_on_after(grace + _STOP_MARGIN):
            with contextlib.suppress(HutchError):
                channel = await self._connect(record.id)
                await channel.request(lambda req: proto.poweroff(grace, record.stop_signal, req=req))
            await _gone(observed.pid)

    async def _observed(self, record: BoxRecord) -> BoxRecord:
        """Bring the record of a box up to date with what the engine observes. The caller holds the lock."""
        engine, directory = self._engines.of(record), self._home.box(record.id)
        if record.state not in ALIVE:
            return record
        # One that is being stopped while nobody holds it was left by a process that died: its stop is finished here.
        if engine.observe(directory).running and record.state is not BoxState.STOPPING:
            if record.state is BoxState.PAUSED and not self._stays_paused(record.id):
                await engine.thaw(directory)
                record = self._save(record, Event.RESUME)
            return record
        words = engine.last_words(directory)
        with anyio.CancelScope(shield=True):
            await engine.kill(directory)
        self._home.pause_mark(record.id).unlink(missing_ok=True)
        self.drop_channel(record.id)
        self.started.discard(record.id)
        ended = logs.exit_record(directory)
        values: dict[str, Any] = {"pid": None, "stopped_at": time.time()}
        if ended is not None:
            values |= {"exit_code": ended[0], "stopped_at": ended[2]}
            return self._follow(record, Event.ENDED, **values)
        if record.state is BoxState.STOPPING:
            return self._follow(record, Event.STOPPED, **values)
        values["reason"] = "the box's processes were killed from outside, or the machine restarted"
        if words:
            values["reason"] += f"; its console said: {words}"
        return self._follow(record, Event.DIED, **values)

    def _stays_paused(self, box_id: str) -> bool:
        """Whether somebody wants the box to be frozen, beyond the moment of a copy."""
        return self._home.pause_mark(box_id).exists()

    def _check_not_paused(self, record: BoxRecord) -> None:
        if self._stays_paused(record.id):
            raise InvalidStateError(f"box {_name(record)} is paused; resume it")

    def _observe(self, record: BoxRecord) -> Observed:
        return self._engines.of(record).observe(self._home.box(record.id))

    def _follow(self, record: BoxRecord, event: Event, **values: Any) -> BoxRecord:
        """`_save` for what is true in any case: where the database cannot take it (the disk is full), whoever looks
        next sees the same again. So a box that has filled the disk can be stopped and removed."""
        try:
            return self._save(record, event, **values)
        except DatabaseError as error:
            log.warning("box %s: %s could not be recorded: %s", _name(record), event, error)
            return msgspec.structs.replace(record, state=lifecycle.after(record.state, event), **values)

    def _save(self, record: BoxRecord, event: Event, **values: Any) -> BoxRecord:
        state = lifecycle.after(record.state, event)
        record = msgspec.structs.replace(record, state=state, updated_at=time.time(), **values)
        self._store.save_box(record)
        return record


def describe(record: BoxRecord) -> BoxInfo:
    """Return the record as the caller sees it."""
    spec = record.spec
    return BoxInfo(
        id=record.id,
        name=spec.name,
        image=spec.image,
        image_digest=record.image_digest,
        state=record.state,
        isolation=type(spec.isolation)(record.isolation),
        created_at=record.created_at,
        updated_at=record.updated_at,
        started_at=record.started_at,
        stopped_at=record.stopped_at,
        exit_code=record.exit_code,
        reason=record.reason,
        labels=spec.labels,
        command=record.command,
        env=record.env,
        workdir=record.workdir,
        user=record.user,
        limits=spec.limits,
        unenforced=record.unenforced,
        mounts=spec.mounts,
        network=network_of(record),
        secrets=spec.secrets,
        auto_remove=spec.auto_remove,
        auto_resume=spec.auto_resume,
        detach=spec.detach,
        tty=spec.tty,
        open_stdin=spec.open_stdin,
        pid=record.pid,
    )


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


def _name(record: BoxRecord) -> str:
    return record.spec.name or record.id
