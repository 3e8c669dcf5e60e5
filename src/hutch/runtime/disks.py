"""Disks of boxes: a writable layer on top of frozen ones.

Freezing the writable layer of a stopped box is a rename, so snapshots and clones of stopped boxes cost nothing (that
of a running box, or of one whose disk has a fixed size, is copied); frozen layers are shared and are deleted when no
box and no snapshot names them.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

import anyio
import msgspec

from hutch.engine.base import Upper
from hutch.errors import DeadlineError, HutchError
from hutch.host.files import locked
from hutch.runtime.home import new_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from hutch.runtime.engines import Engines
    from hutch.runtime.home import Home
    from hutch.state import BoxRecord, Store

log = logging.getLogger("hutch.runtime")

_LOCK_SECONDS = 60.0
_DELETE_PAUSES = (0.01, 0.05, 0.2, 0.5, 1.0, 0.0)


class Disks:
    """The frozen layers of one home."""

    def __init__(self, home: Home, store: Store, engines: Engines) -> None:
        self._home = home
        self._store = store
        self._engines = engines

    @contextlib.asynccontextmanager
    async def using(self) -> AsyncIterator[None]:
        """While this is held no frozen layer is deleted, by any process: for layers that no record names yet."""
        try:
            async with locked(self._home.lock("disks"), timeout=_LOCK_SECONDS, shared=True):
                yield
        except BaseException:
            with anyio.CancelScope(shield=True), contextlib.suppress(HutchError):
                await self.collect()  # the failure may have left a layer without a record
            raise

    async def settle(self, record: BoxRecord) -> BoxRecord:
        """Finish a freeze or a restore that was interrupted, so that the disk is what the record says. The caller
        holds the box."""
        engine, directory = self._engines.of(record), self._home.box(record.id)
        if record.reset_upper:
            await engine.reset_upper(directory)
            return self._saved(record, reset_upper=False)
        if record.disks and not self._home.disk(record.disks[0]).exists():
            await engine.move_upper(directory, self._home.disk(record.disks[0]))
        return record

    async def capture(self, record: BoxRecord, *, running: bool) -> tuple[str, ...]:
        """Return frozen layers that hold the disk as it is now. The caller holds the box (frozen, if it runs) and
        `using`."""
        engine, directory = self._engines.of(record), self._home.box(record.id)
        name = f"{new_id()}-box"
        if not running:
            record = await self.settle(record)
        upper = engine.upper(directory)
        if upper is Upper.EMPTY:
            return record.disks
        if running or upper is Upper.FIXED:
            partial = self._home.disk(f".{name}")
            await engine.copy_upper(directory, partial)
            os.rename(partial, self._home.disk(name))
            return (name, *record.disks)
        # The record first: should we die before the move, `settle` does it.
        record = self._saved(record, disks=(name, *record.disks))
        await engine.move_upper(directory, self._home.disk(name))
        return record.disks

    async def restore(self, record: BoxRecord, disks: tuple[str, ...]) -> None:
        """Make these layers the box's disk. The caller holds the stopped box."""
        before = record.disks
        record = self._saved(record, disks=disks, reset_upper=True)
        await self.settle(record)
        await self.release(before)

    async def release(self, names: Iterable[str]) -> None:
        """Delete those of the layers that nothing names any more. When another process is using layers, `collect`
        does it later."""
        await self._delete_unnamed(set(names))

    async def collect(self) -> None:
        """Delete all frozen layers that nothing names: what dead processes left."""
        await self._delete_unnamed({entry.name for entry in os.scandir(self._home.disks)})

    async def size(self, record: BoxRecord, names: Iterable[str]) -> int:
        """Return what these layers of a box take on the host's disk, in bytes."""
        engine = self._engines.of(record)
        return sum([await engine.tree_size(self._home.disk(name)) for name in names])

    async def written(self, box_id: str) -> int:
        """Return what a box's writable layer takes on the host's disk, in bytes."""
        engine, directory = self._engines.of_box(box_id)
        return await engine.upper_size(directory)

    # Private methods.

    async def _delete_unnamed(self, names: set[str]) -> None:
        if not names:
            return
        with contextlib.suppress(DeadlineError):
            async with locked(self._home.lock("disks"), timeout=0.05):
                named = {disk for record in self._store.list_boxes() for disk in record.disks}
                named |= {disk for record in self._store.list_snapshots() for disk in record.disks}
                for name in names - named:
                    await self._delete(name)

    async def _delete(self, name: str) -> None:
        # The copier of a process that was killed dies with it, but not at once: it may still add a file.
        for pause in _DELETE_PAUSES:
            try:
                await self._engines.container.remove_tree(self._home.disk(name))
            except HutchError as error:
                log.warning("the layer %s cannot be deleted yet: %s", name, error)
                await anyio.sleep(pause)
            else:
                return

    def _saved(
        self, record: BoxRecord, *, disks: tuple[str, ...] | None = None, reset_upper: bool = False
    ) -> BoxRecord:
        record = msgspec.structs.replace(
            record, disks=record.disks if disks is None else disks, reset_upper=reset_upper
        )
        self._store.save_box(record)
        return record
