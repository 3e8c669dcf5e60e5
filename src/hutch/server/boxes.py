"""Boxes: create, find, list, start, stop, remove, measure."""

from __future__ import annotations

import time

from fastapi import APIRouter, Response

from hutch.core.idle import Policy
from hutch.errors import HutchError, InvalidArgumentError, InvalidStateError, StoppedError, UnsupportedError
from hutch.server import network, policy, views
from hutch.server.http import ERRORS, Flag, PageDep, Segment, ServiceDep
from hutch.server.models import (
    BootTiming,
    BoxList,
    BoxMetrics,
    BoxView,
    CreateBox,
    StopRequest,
    VolumeMount,
)
from hutch.server.rules import isolation
from hutch.server.service import Service, Timing
from hutch.types import BoxSpec, BoxState, BoxStats, Limits, Mount

router = APIRouter(prefix="/v1", tags=["boxes"], responses=ERRORS)

DEFAULT_IMAGE = "alpine:latest"


@router.post("/boxes", status_code=201)
async def create_box(body: CreateBox, service: ServiceDep) -> BoxView:
    """Make a box. It is started by its first use, or by `start`."""
    spec = await _spec(service, body)
    begin = time.monotonic()
    try:
        box = await service.backend.create(spec)
    except HutchError:
        service.counters.failed += 1
        raise
    service.counters.created += 1
    service.marks.set_open(box.id, network.is_open(body.network))
    service.timings[box.id] = Timing(create=int((time.monotonic() - begin) * 1000))
    service.touch(box.id)
    return views.box(service, await box.info())


@router.get("/boxes")
async def list_boxes(service: ServiceDep, page: PageDep) -> BoxList:
    """List the boxes, oldest first."""
    infos = page.of(await service.backend.list(), lambda info: (info.created_at, info.id))
    return BoxList(boxes=[views.box(service, info) for info in infos], next_page_token=page.next_token)


@router.get("/boxes/{box_id}")
async def get_box(box_id: Segment, service: ServiceDep) -> BoxView:
    """Find a box by its id or name."""
    box = await service.box(box_id)
    return views.box(service, await box.info())


@router.head("/boxes/{box_id}", status_code=204)
async def box_exists(box_id: Segment, service: ServiceDep) -> Response:
    """Whether a box exists."""
    await service.box(box_id)
    return Response(status_code=204)


@router.delete("/boxes/{box_id}", status_code=204)
async def remove_box(box_id: Segment, service: ServiceDep, force: Flag = False) -> Response:
    """Remove a box and all that it held. One that runs needs `force`."""
    await service.remove(await service.box(box_id), force=force)
    return Response(status_code=204)


@router.post("/boxes/{box_id}/start")
async def start_box(box_id: Segment, service: ServiceDep) -> BoxView:
    """Start a box and its main command. Nothing happens when it runs."""
    box = await service.box(box_id)
    await service.start(box)
    return views.box(service, await box.info())


@router.post("/boxes/{box_id}/stop")
async def stop_box(box_id: Segment, service: ServiceDep, body: StopRequest | None = None) -> BoxView:
    """Stop a box; its files stay. Nothing happens when it does not run."""
    box = await service.box(box_id)
    ran = (await box.info()).state is BoxState.RUNNING
    await box.stop(timeout=(body or StopRequest()).timeout_seconds)
    service.counters.stopped += ran
    service.touch(box.id)
    service.settle(box.id)
    service.box_ended(box.id)
    return views.box(service, await box.info())


@router.get("/boxes/{box_id}/metrics")
async def box_metrics(box_id: Segment, service: ServiceDep) -> BoxMetrics:
    """What a box has done since its start, and what it uses."""
    box = await service.box(box_id)
    try:
        stats = await box.stats()
    except (StoppedError, InvalidStateError):
        stats = BoxStats()
        service.cpu.pop(box.id, None)
    timing = service.timings.get(box.id)
    return BoxMetrics(
        commands_executed_total=stats.commands_started,
        exec_errors_total=stats.commands_failed,
        bytes_sent_total=stats.input_bytes,
        bytes_received_total=stats.output_bytes,
        cpu_percent=_cpu_percent(service, box.id, stats),
        memory_bytes=stats.memory_bytes,
        network_bytes_sent=stats.network_sent_bytes,
        network_bytes_received=stats.network_received_bytes,
        network_tcp_connections=stats.network_connections,
        boot_timing=BootTiming(total_create_ms=timing.create, container_init_ms=timing.start) if timing else None,
    )


def _cpu_percent(service: Service, box_id: str, stats: BoxStats) -> float | None:
    """Of one processor, since the last look (the first time: since the start)."""
    if stats.cpu_seconds is None:
        return None
    now = time.monotonic()
    before, used = service.cpu.get(box_id, (now - stats.uptime_seconds, 0.0))
    service.cpu[box_id] = (now, stats.cpu_seconds)
    span = now - before
    return round(100 * max(0.0, stats.cpu_seconds - used) / span, 2) if span > 0 else 0.0


async def _spec(service: Service, body: CreateBox) -> BoxSpec:
    """Check what the types do not tell, and translate. Raises `InvalidArgumentError` and `UnsupportedError`."""
    if body.rootfs_path is not None:
        raise UnsupportedError("rootfs_path: folders of the server's machine cannot be used over this interface")
    if body.advanced is not None and body.advanced.capabilities is not None:
        raise UnsupportedError("advanced.capabilities: this server does not change the capabilities of boxes")
    outbound, secrets = await network.asked(service, body.network, body.secrets)
    policy.check_labels(body.labels)
    if body.working_dir is not None and not body.working_dir.startswith("/"):
        raise InvalidArgumentError(f"working_dir: {body.working_dir!r:.200} is not an absolute path")
    rules = Policy(
        auto_stop=policy.check_seconds("auto_stop", body.auto_stop, service.settings.auto_stop),
        auto_delete=policy.check_seconds("auto_delete", body.auto_delete, service.settings.auto_delete),
        auto_resume=body.auto_resume is not False,
    )
    has_main = body.cmd is not None or body.entrypoint is not None
    return BoxSpec(
        image=body.image or DEFAULT_IMAGE,
        name=body.name,
        command=None if body.cmd is None else tuple(body.cmd),
        entrypoint=None if body.entrypoint is None else tuple(body.entrypoint),
        env={**network.placeholders(secrets), **body.env},
        workdir=body.working_dir,
        user=body.user,
        labels={**body.labels, **policy.to_labels(rules)},
        limits=Limits(cpus=body.cpus, memory_mib=body.memory_mib, disk_gb=body.disk_size_gb),
        mounts=tuple([await _mount(service, volume) for volume in body.volumes]),
        network=outbound,
        secrets=secrets,
        isolation=isolation(service.settings, body.isolation),
        # Only who says so gets back a box that was stopped on request; after the idle policy it is the rule.
        auto_resume=body.auto_resume is True,
        detach=True,
        tty=body.tty,
        # Clients attach to a main command to type as well.
        open_stdin=has_main,
    )


async def _mount(service: Service, volume: VolumeMount) -> Mount:
    if volume.host_path is not None:
        raise UnsupportedError("volumes: folders of the server's machine cannot be mounted over this interface")
    if volume.managed_volume is None:
        raise InvalidArgumentError("volumes: managed_volume is missing")
    if not volume.guest_path.startswith("/"):
        raise InvalidArgumentError(f"volumes: the guest_path {volume.guest_path!r:.200} is not an absolute path")
    found = await find_volume(service, volume.managed_volume)
    return Mount(target=volume.guest_path, volume=found, read_only=volume.read_only)


async def find_volume(service: Service, key: str) -> str:
    """Return the name of the volume that has this id or name. Raises `NotFoundError`."""
    for info in await service.backend.volumes.list():
        if key in (info.id, info.name):
            return info.name
    return (await service.backend.volumes.get(key)).name
