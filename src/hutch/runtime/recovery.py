"""Bringing a home to order after processes that died."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hutch.core import ids
from hutch.errors import HutchError
from hutch.host.files import locked
from hutch.runtime.gatekeeper import is_served
from hutch.runtime.records import ALIVE
from hutch.types import BoxState

if TYPE_CHECKING:
    from hutch.runtime.runtime import LocalRuntime
    from hutch.state import BoxRecord


async def recover(runtime: LocalRuntime) -> None:
    """Mark boxes that are gone, set those going that were left frozen, remove what nobody owns."""
    for record in runtime.store.list_boxes(*ALIVE):
        with contextlib.suppress(HutchError):
            if record.state in (BoxState.PAUSED, BoxState.STOPPING):
                await runtime.records.settle_forsaken(record.id)
            elif not runtime.engines.of(record).observe(runtime.home.box(record.id)).running:
                await runtime.records.refresh(record.id)
            elif not runtime.is_gateway and is_served(record.spec):
                await runtime.gatekeeper.revive(record.id)
    for record in runtime.store.list_boxes_to_remove():
        if _forsaken(record):
            with contextlib.suppress(HutchError):
                await runtime.remove(record.id, force=True)
    for name in {path.name for folder in (runtime.home.boxes, runtime.home.locks) for path in folder.iterdir()}:
        if ids.is_id(name) and runtime.store.get_box(name) is None:
            with contextlib.suppress(HutchError):
                await _erase_orphan(runtime, name)
    await runtime.disks.collect()


async def _erase_orphan(runtime: LocalRuntime, box_id: str) -> None:
    async with locked(runtime.home.lock(box_id), timeout=1.0):
        if runtime.store.get_box(box_id) is None:
            await runtime.engines.container.kill(runtime.home.box(box_id))
            await runtime.engines.container.remove_tree(runtime.home.box(box_id))
            runtime.home.lock(box_id).unlink(missing_ok=True)


def _forsaken(record: BoxRecord) -> bool:
    """Whether a box that goes at its end has come to it: it has run, or nobody is left whom it belongs to."""
    if record.state in (BoxState.STOPPED, BoxState.FAILED) and record.started_at is not None:
        return True
    return not record.spec.detach and record.owner is not None and not record.owner.alive()
