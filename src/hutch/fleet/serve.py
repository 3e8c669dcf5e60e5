"""The processes of a fleet. Each listens first, tells ``started``, and then runs until its server is stopped."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio
import msgspec

from hutch.fleet.api import with_door
from hutch.fleet.runner import make_app, report
from hutch.fleet.runtime import FleetRuntime
from hutch.runtime.runtime import LocalRuntime
from hutch.server.app import make_app as make_public_app
from hutch.server.serve import address, bounds_beside, listen, run

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.server.serve import Started
    from hutch.server.settings import ServerSettings
    from hutch.types import NetBounds


async def serve_api(
    database: Path, settings: ServerSettings, *, join_token: str, host: str, port: int, started: Started
) -> None:
    """Serve the public interface over runners that join with the token."""
    with listen(host, port) as sock:
        async with FleetRuntime(database) as fleet:
            await run(with_door(make_public_app(fleet, settings), fleet, join_token), settings, sock, started)


async def serve_runner(
    home: Path,
    settings: ServerSettings,
    *,
    join: str,
    token: str,
    host: str,
    port: int,
    public_url: str | None,
    started: Started,
) -> None:
    """Serve a home's boxes to the API at ``join``. ``public_url``: how the API reaches us, if not by host and port."""
    with listen(host, port) as sock:
        url = public_url or address(sock)
        bounds = told_by(url, bounds_beside(settings, sock))
        async with LocalRuntime(home, bounds=bounds) as runtime, anyio.create_task_group() as tasks:
            tasks.start_soon(report, runtime, join, token, url)
            await run(make_app(runtime), settings, sock, started)
            tasks.cancel_scope.cancel()


def told_by(url: str, bounds: NetBounds) -> NetBounds:
    """The bounds, with what clients are told where ports are published at every address: by which of them they reach
    the runner they learn from nobody else."""
    host = urlsplit(url).hostname or ""
    if not _is_every(bounds.publish_address) or _is_every(host):
        return bounds
    return msgspec.structs.replace(bounds, publish_told=host)


def _is_every(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:  # a name, or nothing
        return False
