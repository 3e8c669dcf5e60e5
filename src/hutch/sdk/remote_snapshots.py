"""Snapshots of a box behind a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.core import ids
from hutch.runtime.checks import check_name
from hutch.sdk.remote_wire import NameBody
from hutch.types import SnapshotInfo

if TYPE_CHECKING:
    from hutch.sdk.remote_http import Http


class RemoteSnapshots:
    """The snapshots of one box. Implements `hutch.sdk.base.Snapshots`."""

    def __init__(self, http: Http, box_path: str) -> None:
        self._http = http
        self._path = f"{box_path}/snapshots"
        self._one = f"{box_path}/snapshot"

    async def create(self, name: str) -> SnapshotInfo:
        """Save the disk now. Raises `AlreadyExistsError`."""
        ids.check_name(name, "snapshot")
        return await self._http.call("POST", self._path, SnapshotInfo, NameBody(name=name))

    async def list(self) -> list[SnapshotInfo]:
        """List the snapshots, oldest first."""
        return await self._http.get(self._path, list[SnapshotInfo])

    async def get(self, name: str) -> SnapshotInfo:
        """Find one by name or id. Raises `NotFoundError`."""
        return await self._http.get(self._one, SnapshotInfo, name=check_name("the snapshot", name))

    async def restore(self, name: str) -> None:
        """Take the disk back to the snapshot. Raises `InvalidStateError` while the box runs."""
        await self._http.call("POST", f"{self._one}/restore", object, NameBody(name=name))

    async def remove(self, name: str) -> None:
        """Delete a snapshot."""
        await self._http.call("DELETE", self._one, object, query={"name": check_name("the snapshot", name)})
