"""The records of the boxes of one home, kept true, and the lock under which one is changed.

A change to one box is made under its lock file, so that any number of processes can share a home. The truth about a
running box is what the engine observes; records follow, here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from hutch.core import lifecycle
from hutch.core.lifecycle import Event
from hutch.errors import DatabaseError, HutchError, InvalidStateError
from hutch.host.files import locked
from hutch.runtime import logs
from hutch.runtime.bounds import network_of
from hutch.types import BoxInfo, BoxState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hutch.engine.base import Observed
    from hutch.runtime.channels import Channels
    from hutch.runtime.engines import Engines
    from hutch.runtime.home import Home
    from hutch.state import BoxRecord, Store

log = logging.getLogger("hutch.runtime")

ALIVE = (BoxState.RUNNING, BoxState.STOPPING, BoxState.PAUSED, BoxState.UNKNOWN)
_LOCK_SECONDS = 120.0


class Records:
    """See the module."""

    def __init__(self, home: Home, store: Store, engines: Engines, channels: Channels) -> None:
        self._home = home
        self._store = store
        self._engines = engines
        self._channels = channels
        # Boxes that this process started and that have not ended since.
        self.started: set[str] = set()

    async def info(self, box_id: str) -> BoxInfo:
        """Return a box's record and true state."""
        return describe(await self.refresh(box_id))

    async def refresh(self, box_id: str) -> BoxRecord:
        """Bring a record up to date with what the engine observes, and return it."""
        return await self.verified(self._store.box(box_id))

    async def verified(self, record: BoxRecord) -> BoxRecord:
        """`refresh` for a record that has just been read."""
        if record.state not in ALIVE:
            return record
        if (record.state is not BoxState.PAUSED or self.stays_paused(record.id)) and self.observe(record).running:
            return record
        async with self.holding(record.id) as current:
            return current

    async def settle_forsaken(self, box_id: str) -> None:
        """Set a frozen box going again, or finish its stop, if the process at it has died: then nobody holds the box.

        Raises `DeadlineError` when somebody does.
        """
        async with locked(self._home.lock(box_id), timeout=0):
            await self.observed(self._store.box(box_id))

    # Holding.

    @contextlib.asynccontextmanager
    async def holding_stopped(self, box_id: str, what: str) -> AsyncIterator[BoxRecord]:
        """Hold the lock of a box that must not run. Raises `InvalidStateError` when it does."""
        async with self.holding(box_id) as record:
            if record.state in ALIVE:
                raise InvalidStateError(f"box {title(record)} runs; stop it before {what}")
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
                self.check_not_paused(record)
            # The record first: should we die while it is frozen, whoever holds the box next sets it going again.
            if record.state is not BoxState.PAUSED:
                record = self.save(record, Event.PAUSE)
            try:
                await (engine.freeze(directory) if memory is None else engine.save(directory, memory))
                yield record, True
            finally:
                with anyio.CancelScope(shield=True):
                    await self.observed(self._store.box(box_id))

    @contextlib.asynccontextmanager
    async def holding(self, box_id: str) -> AsyncIterator[BoxRecord]:
        """Hold the lock of a box, with its record as it truly is: no other process changes it meanwhile."""
        async with locked(self._home.lock(box_id), timeout=_LOCK_SECONDS):
            # Whoever is to end a box that cannot go on must be able to hold it.
            yield await self.observed(self._store.box(box_id), must_go_on=False)

    # What whoever holds a box does to its record.

    async def observed(self, record: BoxRecord, *, must_go_on: bool = True) -> BoxRecord:
        """Bring the record of a box up to date with what the engine observes. The caller holds the lock.
        ``must_go_on``: raise the engine's error when a frozen box cannot be set going; else it stays a paused one."""
        engine, directory = self._engines.of(record), self._home.box(record.id)
        if record.state not in ALIVE:
            return record
        # One that is being stopped while nobody holds it was left by a process that died: its stop is finished here.
        if engine.observe(directory).running and record.state is not BoxState.STOPPING:
            if record.state is BoxState.PAUSED and not self.stays_paused(record.id):
                try:
                    await engine.thaw(directory)
                except HutchError as error:
                    if must_go_on:
                        raise
                    log.warning("box %s cannot be set going: %s", title(record), error)
                    return record
                record = self.follow(record, Event.RESUME)
            return record
        words = engine.last_words(directory)
        with anyio.CancelScope(shield=True):
            await engine.kill(directory)
        self._home.pause_mark(record.id).unlink(missing_ok=True)
        self._channels.drop(record.id)
        self.started.discard(record.id)
        ended = logs.exit_record(directory)
        values: dict[str, Any] = {"pid": None, "stopped_at": time.time()}
        if ended is not None:
            values |= {"exit_code": ended[0], "stopped_at": ended[2]}
            return self.follow(record, Event.ENDED, **values)
        if record.state is BoxState.STOPPING:
            return self.follow(record, Event.STOPPED, **values)
        values["reason"] = "the box's processes were killed from outside, or the machine restarted"
        if words:
            values["reason"] += f"; its console said: {words}"
        return self.follow(record, Event.DIED, **values)

    def stays_paused(self, box_id: str) -> bool:
        """Whether somebody wants the box to be frozen, beyond the moment of a copy."""
        return self._home.pause_mark(box_id).exists()

    def check_not_paused(self, record: BoxRecord) -> None:
        if self.stays_paused(record.id):
            raise InvalidStateError(f"box {title(record)} is paused; resume it")

    def observe(self, record: BoxRecord) -> Observed:
        return self._engines.of(record).observe(self._home.box(record.id))

    def follow(self, record: BoxRecord, event: Event, **values: Any) -> BoxRecord:
        """`save` for what is true in any case: where the database cannot take it (the disk is full), whoever looks
        next sees the same again. So a box that has filled the disk can be stopped and removed."""
        try:
            return self.save(record, event, **values)
        except DatabaseError as error:
            log.warning("box %s: %s could not be recorded: %s", title(record), event, error)
            return msgspec.structs.replace(record, state=lifecycle.after(record.state, event), **values)

    def save(self, record: BoxRecord, event: Event, **values: Any) -> BoxRecord:
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


def title(record: BoxRecord) -> str:
    """What messages call the box."""
    return record.spec.name or record.id
