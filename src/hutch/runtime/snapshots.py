"""Snapshots of a box's disk."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hutch.core import ids
from hutch.errors import AlreadyExistsError, NotFoundError
from hutch.runtime.checks import quoted
from hutch.runtime.home import new_id
from hutch.state import SnapshotRecord
from hutch.types import SnapshotInfo

if TYPE_CHECKING:
    from hutch.runtime.runtime import LocalRuntime


class BoxSnapshots:
    """The snapshots of one box. Implements `hutch.sdk.base.Snapshots`."""

    def __init__(self, runtime: LocalRuntime, box_id: str) -> None:
        self._runtime = runtime
        self._box_id = box_id

    async def create(self, name: str) -> SnapshotInfo:
        """Save the disk now. A running box is frozen for the moment of the copy. Raises `AlreadyExistsError`."""
        ids.check_name(name, "snapshot")
        disks = self._runtime.disks
        async with disks.using(), self._runtime.records.holding_still(self._box_id) as (record, running):
            if any(other.name == name for other in self._runtime.store.list_snapshots(self._box_id)):
                raise AlreadyExistsError(f"the box has a snapshot named {name!r} already")
            layers = await disks.capture(record, running=running)
            snapshot = SnapshotRecord(
                id=new_id(),
                name=name,
                box_id=self._box_id,
                disks=layers,
                size=await disks.size(record, layers),
                created_at=time.time(),
            )
            self._runtime.store.add_snapshot(snapshot)
        return _describe(snapshot)

    async def list(self) -> list[SnapshotInfo]:
        """List the snapshots, oldest first."""
        self._runtime.store.box(self._box_id)
        return [_describe(record) for record in self._runtime.store.list_snapshots(self._box_id)]

    async def get(self, name: str) -> SnapshotInfo:
        """Find one by name or id. Raises `NotFoundError`."""
        return _describe(self._find(name))

    async def restore(self, name: str) -> None:
        """Take the disk back to the snapshot. Raises `InvalidStateError` while the box runs."""
        async with self._runtime.records.holding_stopped(self._box_id, "a restore") as record:
            await self._runtime.disks.restore(record, self._find(name).disks)

    async def remove(self, name: str) -> None:
        """Delete a snapshot."""
        async with self._runtime.records.holding(self._box_id):
            snapshot = self._find(name)
            self._runtime.store.remove_snapshot(snapshot.id)
            await self._runtime.disks.release(snapshot.disks)

    def _find(self, name: str) -> SnapshotRecord:
        self._runtime.store.box(self._box_id)
        for record in self._runtime.store.list_snapshots(self._box_id):
            if name in (record.name, record.id):
                return record
        raise NotFoundError(f"the box has no snapshot {quoted(name)}")


def _describe(record: SnapshotRecord) -> SnapshotInfo:
    return SnapshotInfo(
        id=record.id, name=record.name, box_id=record.box_id, size=record.size, created_at=record.created_at
    )
