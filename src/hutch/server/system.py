"""Discovery, identity, health, counters."""

from __future__ import annotations

from fastapi import APIRouter, Request

from hutch import __version__
from hutch.server.http import ERRORS, ServiceDep
from hutch.server.models import Capabilities, ConfigView, Health, Me, RuntimeMetrics
from hutch.types import BoxState, Outbound

router = APIRouter(responses=ERRORS)


@router.get("/health", tags=["system"])
@router.get("/v1/health", tags=["system"])
async def health() -> Health:
    """Whether the server answers. Needs no key."""
    return Health(version=__version__)


@router.get("/v1/config", tags=["system"])
async def config(service: ServiceDep) -> ConfigView:
    """What this server can do. Needs no key."""
    settings = service.settings
    network = settings.network.outbound is not Outbound.DISABLED and await service.has_network()
    return ConfigView(
        version=__version__,
        capabilities=Capabilities(network_enabled=network, secrets_enabled=network),
        isolations=list(settings.isolations),
        defaults={"auto_stop": settings.auto_stop, "auto_delete": settings.auto_delete},
        limits={
            "max_cpus": 32,
            "max_memory_mib": 65536,
            "max_disk_size_gb": 1024,
            "exec_timeout_max_seconds": int(settings.max_exec_timeout or 0),
            "file_transfer_max_bytes": settings.max_transfer_bytes,
            "idempotency_key_lifetime": int(settings.idempotency_seconds),
        },
    )


@router.get("/v1/me", tags=["system"])
async def me(request: Request, service: ServiceDep) -> Me:
    """Whose key this is, and what it may do."""
    principal = request.scope["hutch.principal"]
    scopes = ["read"] if principal == "read" else ["read", "write"]
    return Me(sub=f"key:{principal}", scopes=scopes, path_prefix=service.settings.path_prefix.strip("/") or None)


@router.get("/v1/metrics", tags=["system"])
async def metrics(service: ServiceDep) -> RuntimeMetrics:
    """What this server has done since its start."""
    counters = service.counters
    return RuntimeMetrics(
        boxes_created_total=counters.created,
        boxes_failed_total=counters.failed,
        boxes_stopped_total=counters.stopped,
        num_running_boxes=sum(info.state is BoxState.RUNNING for info in await service.backend.list()),
        total_commands_executed=counters.commands,
        total_exec_errors=counters.exec_errors,
    )
