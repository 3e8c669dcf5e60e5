"""cp, clone, fork, export, import: files and whole boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.cli import output
from hutch.cli.parser import UsageError

if TYPE_CHECKING:
    from hutch.cli.parser import Arguments
    from hutch.cli.session import Session


async def cp(session: Session, args: Arguments) -> int:
    """Copy between a box and the host."""
    source, target = _place(args.source), _place(args.target)
    if (source is None) == (target is None):
        raise UsageError("exactly one of SOURCE and TARGET must be BOX:PATH")
    async with session.runtime() as runtime:
        if target is not None:
            box = await runtime.get(target[0])
            overwrite, follow = not args.no_clobber, args.follow_links
            await box.files.put(args.source, target[1], overwrite=overwrite, follow_symlinks=follow)
        elif source is not None:
            box = await runtime.get(source[0])
            await box.files.get(source[1], args.target, overwrite=not args.no_clobber)
    return 0


def _place(text: str) -> tuple[str, str] | None:
    """``BOX:PATH`` → (box, path); `None` for a host path: a slash or a first dot before the colon."""
    box, colon, path = text.partition(":")
    if not colon or not box or "/" in box or box.startswith("."):
        return None
    return box, path or "."


async def clone(session: Session, args: Arguments) -> int:
    """Copy a box."""
    async with session.runtime() as runtime:
        box = await (await runtime.get(args.box)).clone(args.name)
        output.line(box.id)
    return 0


async def fork(session: Session, args: Arguments) -> int:
    """Fork a box."""
    async with session.runtime() as runtime:
        box = await (await runtime.get(args.box)).fork(args.name)
        await box.detach()
        output.line(box.id)
    return 0


async def export(session: Session, args: Arguments) -> int:
    """Write a box to an archive."""
    async with session.runtime() as runtime:
        await (await runtime.get(args.box)).export(args.file)
    return 0


async def import_(session: Session, args: Arguments) -> int:
    """Make a box from an archive."""
    async with session.runtime() as runtime:
        box = await runtime.import_box(args.file, name=args.name)
        output.line(box.id)
    return 0
