"""snapshot create, ls, restore, rm."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hutch.cli import output
from hutch.errors import HutchError

if TYPE_CHECKING:
    from hutch.cli.parser import Arguments
    from hutch.cli.session import Session


async def create(session: Session, args: Arguments) -> int:
    """Save a box's disk."""
    async with session.runtime() as runtime:
        snapshot = await (await runtime.get(args.box)).snapshots.create(args.name)
        output.line(snapshot.name)
    return 0


async def ls(session: Session, args: Arguments) -> int:
    """List a box's snapshots."""
    async with session.runtime() as runtime:
        snapshots = await (await runtime.get(args.box)).snapshots.list()
    if args.json:
        output.json_value(snapshots)
    elif args.quiet:
        for snapshot in snapshots:
            output.line(snapshot.name)
    else:
        now = time.time()
        rows = (
            (s.name, s.id[: output.SHORT_ID], output.size(s.size), output.ago(s.created_at, now)) for s in snapshots
        )
        output.table(("NAME", "ID", "SIZE", "CREATED"), rows)
    return 0


async def restore(session: Session, args: Arguments) -> int:
    """Take a box's disk back."""
    async with session.runtime() as runtime:
        await (await runtime.get(args.box)).snapshots.restore(args.name)
        output.line(args.name)
    return 0


async def rm(session: Session, args: Arguments) -> int:
    """Remove snapshots; try all."""
    failed = False
    async with session.runtime() as runtime:
        snapshots = (await runtime.get(args.box)).snapshots
        for name in args.name:
            try:
                await snapshots.remove(name)
            except HutchError as error:
                output.error(error)
                failed = True
            else:
                output.line(name)
    return int(failed)
