"""Copies of boxes: clones, forks, archives."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

import anyio
import msgspec

from hutch.core import agentproto as proto
from hutch.core import ids, lifecycle
from hutch.engine.base import NO_FORK, Capability
from hutch.errors import AlreadyExistsError, HutchError, InvalidStateError, StorageError, UnsupportedError
from hutch.host.files import locked
from hutch.host.proc import Process
from hutch.runtime import archive
from hutch.runtime.bounds import with_free_ports
from hutch.runtime.checks import check_path
from hutch.runtime.home import new_id
from hutch.runtime.records import title
from hutch.types import BoxState, Isolation, NetPolicy

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from hutch.state import BoxRecord


class Copies:
    """What makes a box of another one, or of an archive."""

    def __init__(self, runtime: LocalRuntime) -> None:
        self._runtime = runtime
        self._home = runtime.home
        self._engines = runtime.engines
        self._records = runtime.records

    async def clone(self, box_id: str, name: str | None) -> LocalBox:
        """Make a new, stopped box with a copy of a box's disk and configuration."""
        self._runtime.check_open()
        self._check_new_name(name)
        bounds = self._runtime.bounds
        async with self._runtime.disks.using(), self._records.holding_still(box_id) as (record, running):
            disks = await self._runtime.disks.capture(record, running=running)
            now = time.time()
            copy = msgspec.structs.replace(
                _unstarted(record, now),
                id=new_id(),
                spec=msgspec.structs.replace(
                    record.spec,
                    name=name,
                    network=with_free_ports(bounds, record.spec.network) if bounds else record.spec.network,
                ),
                disks=disks,
            )
            self._runtime.add(copy)
        return self._runtime.handle(copy)

    async def fork(self, box_id: str, name: str | None) -> LocalBox:
        """Make a new box that goes on, memory and all, where a running one is."""
        self._runtime.check_open()
        self._check_new_name(name)
        parent = self._runtime.store.box(box_id)
        if Capability.FORK not in self._engines.of(parent).capabilities:
            raise UnsupportedError(NO_FORK)
        child = new_id()
        memory = self._home.saved_memory(child)
        # Until it has a record, the lock alone keeps others from clearing the new box away.
        async with self._runtime.disks.using(), locked(self._home.lock(child), timeout=1.0):
            memory.parent.mkdir(mode=0o711)
            try:
                async with self._records.holding_still(box_id, memory=memory) as (record, running):
                    if not running:
                        raise InvalidStateError(f"box {title(record)} does not run ({record.state}); clone it")
                    disks = await self._runtime.disks.capture(record, running=True)
                copy = msgspec.structs.replace(
                    _unstarted(record, time.time()),
                    id=child,
                    spec=msgspec.structs.replace(
                        record.spec, name=name, network=with_free_ports(self._runtime.bounds, record.spec.network)
                    ),
                    disks=disks,
                )
                self._runtime.add(copy)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self._engines.container.remove_tree(memory.parent)
                    self._home.lock(child).unlink(missing_ok=True)
                raise
        try:
            await self._runtime.lives.start(child)
        except BaseException:
            with anyio.CancelScope(shield=True), contextlib.suppress(HutchError):
                await self._runtime.remove(child, force=True)
            raise
        return self._runtime.handle(copy)

    async def export(self, box_id: str, path: str | Path) -> None:
        """Write a box to an archive file."""
        self._runtime.check_open()
        target = check_path("the archive", path)
        async with self._runtime.disks.using():
            async with self._records.holding_still(box_id) as (record, running):
                disks = await self._runtime.disks.capture(record, running=running)
            if record.isolation == Isolation.VM:
                await self._export_vm(target, record, disks)
            else:
                await archive.write(target, record, self._layer_sources(record, disks))
        await self._runtime.disks.release(disks)

    async def import_box(self, path: str | Path, name: str | None) -> LocalBox:
        """Make a box from an archive that `export` wrote. The archive is not trusted."""
        self._runtime.check_open()
        self._check_new_name(name)
        async with self._runtime.disks.using():
            contents, disks = await archive.read(check_path("the archive", path), self._home, self._engines.container)
            now = time.time()
            spec = msgspec.structs.replace(contents.spec, name=name, mounts=(), network=NetPolicy(), detach=False)
            record = msgspec.structs.replace(
                _unstarted(contents, now),
                id=new_id(),
                spec=spec,
                isolation=await self._engines.choose(spec),
                image_digest="",
                disks=disks,
                bounds=None,
            )
            self._runtime.add(record)
        return self._runtime.handle(record)

    # Private methods.

    def _check_new_name(self, name: str | None) -> None:
        if name is not None:
            ids.check_name(name)
            if self._runtime.store.has_box_named(name):
                raise AlreadyExistsError(f"a box named {name!r} exists already")

    async def _export_vm(self, target: Path, record: BoxRecord, disks: tuple[str, ...]) -> None:
        """Only a kernel reads a VM's disk, and only that of a VM reads one that a box may have forged: a box on the
        same disk, and with nothing else of the first one, gives its files, as one layer."""
        name = f"export-{new_id()}"
        spec = msgspec.structs.replace(
            record.spec,
            name=name,
            command=None,
            auto_remove=True,
            detach=False,
            mounts=(),
            network=NetPolicy(),
            secrets=(),
        )
        reader = msgspec.structs.replace(
            _unstarted(msgspec.structs.replace(record, command=None), time.time()),
            id=new_id(),
            spec=spec,
            disks=disks,
            sealed=b"",
        )
        self._runtime.add(reader)
        try:
            box = self._runtime.handle(reader)
            execution = await box.start_file_op(
                proto.FileOp.ROOT, "/", user="root", linger=None, sinks={proto.STDERR: _ignore}
            )
            chunks = aiter(execution.stdout)
            await archive.write(target, record, [archive.stream(chunks)])
            result = await execution.wait()
            if result.exit_code != 0:
                raise StorageError(f"not all files of the box could be read (exit code {result.exit_code})")
        finally:
            with anyio.CancelScope(shield=True), contextlib.suppress(HutchError):
                await self._runtime.remove(reader.id, force=True)

    def _layer_sources(self, record: BoxRecord, disks: tuple[str, ...]) -> list[archive.LayerWriter]:
        """The layers of a box, topmost first."""
        layers = [(lower.path, lower.owned_by_box) for lower in map(self._home.lower, disks)]
        if record.image_digest:
            image = self._runtime.image_store.get(record.image_digest)
            layers += [(path, False) for path in self._runtime.image_store.layer_paths(image)]
        return [archive.folder(path, owned_by_box=owned_by_box) for path, owned_by_box in layers]


def _unstarted(record: BoxRecord, now: float) -> BoxRecord:
    return msgspec.structs.replace(
        record,
        state=lifecycle.after(BoxState.CONFIGURED, lifecycle.Event.STOPPED)
        if record.command is not None
        else BoxState.CONFIGURED,
        created_at=now,
        updated_at=now,
        pid=None,
        started_at=None,
        stopped_at=None,
        exit_code=None,
        reason=None,
        unenforced=(),
        reset_upper=False,
        owner=Process.of(os.getpid()),
    )


def _ignore(data: bytes) -> None:
    pass
