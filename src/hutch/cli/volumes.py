"""volume create, ls, inspect, rm."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hutch.cli import each, output

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from hutch.cli.parser import Arguments
    from hutch.cli.session import Session
    from hutch.sdk.base import Volumes


async def create(session: Session, args: Arguments) -> int:
    """Make volumes."""
    return await _each(session, args.name, lambda volumes, name: volumes.create(name))


async def ls(session: Session, args: Arguments) -> int:
    """List volumes."""
    async with session.runtime() as runtime:
        volumes = await runtime.volumes.list()
    if args.json:
        output.json_value(volumes)
    elif args.quiet:
        for volume in volumes:
            output.line(volume.name)
    else:
        now = time.time()
        rows = ((v.name, v.id[: output.SHORT_ID], output.size(v.size), output.ago(v.created_at, now)) for v in volumes)
        output.table(("NAME", "ID", "SIZE", "CREATED"), rows)
    return 0


async def inspect(session: Session, args: Arguments) -> int:
    """Print records of volumes."""
    async with session.runtime() as runtime:
        return await each.inspect(args.volume, runtime.volumes.get)


async def rm(session: Session, args: Arguments) -> int:
    """Remove volumes."""
    return await _each(session, args.volume, lambda volumes, name: volumes.remove(name))


async def _each(session: Session, names: Iterable[str], action: Callable[[Volumes, str], Awaitable[object]]) -> int:
    async with session.runtime() as runtime:
        done, code = await each.each(names, lambda name: action(runtime.volumes, name))
    for name, _ in done:
        output.line(name)
    return code
