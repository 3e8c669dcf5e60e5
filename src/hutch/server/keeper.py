"""The background work of a server: the idle policy."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import anyio

from hutch.core.idle import Policy, Step, due
from hutch.errors import HutchError
from hutch.server import policy
from hutch.types import BoxState, ExecState

if TYPE_CHECKING:
    from hutch.sdk.base import Box
    from hutch.server.service import Service
    from hutch.types import BoxInfo

log = logging.getLogger("hutch.server")


async def keep(service: Service) -> None:
    """Stop and remove idle boxes, forget old executions, write down what is used; for as long as the server runs."""
    while True:
        await anyio.sleep(service.settings.sweep_seconds)
        try:
            await sweep(service)
        except HutchError as error:
            log.warning("the idle policy could not be applied: %s", error)


async def sweep(service: Service) -> None:
    """Do what is due now."""
    service.executions.sweep()
    infos = {info.id: info for info in await service.backend.list()}
    service.tunnels.sweep(infos)
    for box_id in service.marks.boxes():
        info = infos.get(box_id)
        if info is None:
            service.forget(box_id)
            continue
        try:
            await _attend(service, info)
        except HutchError as error:
            log.warning("box %s: the idle policy could not be applied: %s", box_id, error)
    service.marks.flush()


async def _attend(service: Service, info: BoxInfo) -> None:
    rules = policy.from_labels(info.labels)
    step = _due(service, rules, info)
    if step is Step.NOTHING:
        return
    box = await service.backend.get(info.id)
    if step is Step.STOP:
        if await _busy(service, box):
            service.touch(info.id)
        else:
            log.info("box %s is idle since %d s or more and is stopped", info.id, rules.auto_stop)
            await service.stop_idle(box, lambda: _due(service, rules, info) is Step.STOP)
    elif step is Step.DELETE:
        log.info("box %s has been idle for %d s and is removed", info.id, rules.auto_delete)
        await service.remove(box, force=False)


def _due(service: Service, rules: Policy, info: BoxInfo) -> Step:
    mark = service.marks.get(info.id)
    if mark is None or info.state in (BoxState.STOPPING, BoxState.PAUSED, BoxState.UNKNOWN):
        return Step.NOTHING
    return due(rules, running=info.state is BoxState.RUNNING, idle=time.time() - mark.at)


async def _busy(service: Service, box: Box) -> bool:
    """Whether a command runs that is more than a terminal that somebody has left open: the work of one that is only
    waited for must not be cut off."""
    infos = await service.executions.running_or_recent(box)
    return any(info.state is ExecState.RUNNING and not info.tty for info in infos or ())
