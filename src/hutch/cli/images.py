"""image pull, ls, inspect, tag, login, logins, logout, rm, import, bootstrap, prune."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hutch.cli import each, output, terminal
from hutch.cli.parser import UsageError
from hutch.cli.progress import Display
from hutch.errors import HutchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hutch.cli.parser import Arguments
    from hutch.cli.session import Session
    from hutch.types import ImageInfo

_DANGLING = "<none>"


async def pull(session: Session, args: Arguments) -> int:
    """Fetch an image; what the registry says now counts, not what was fetched before."""
    async with session.runtime() as runtime:
        with Display(f"pulled {args.reference}", quiet=args.quiet) as display:
            image = await runtime.images.pull(args.reference, platform=args.platform, always=True, progress=display)
    _print([image], args)
    return 0


async def import_(session: Session, args: Arguments) -> int:
    """Load images from a directory or an archive."""
    async with session.runtime() as runtime:
        with Display(f"imported {args.path}", quiet=args.quiet) as display:
            images = await runtime.images.load(
                args.path, reference=args.reference, platform=args.platform, progress=display
            )
    _print(images, args)
    return 0


async def bootstrap(session: Session, args: Arguments) -> int:
    """Make a base image from the machine's own packages."""
    flavour = args.flavour or "debian"
    async with session.runtime() as runtime:
        with Display(f"made {args.reference or flavour}", quiet=args.quiet) as display:
            image = await runtime.images.bootstrap(
                flavour, reference=args.reference, packages=args.package, progress=display
            )
    _print([image], args)
    return 0


def _print(images: Sequence[ImageInfo], args: Arguments) -> None:
    if args.json:
        output.json_value(images)
        return
    for image in images:
        output.line(image.digest if args.quiet or not image.references else f"{image.references[0]} {image.digest}")


async def ls(session: Session, args: Arguments) -> int:
    """List images: a row for every reference."""
    async with session.runtime() as runtime:
        images = await runtime.images.list()
    if args.json:
        output.json_value(images)
    elif args.quiet:
        for image in images:
            output.line(image.digest)
    elif args.names:
        for image in images:
            for reference in image.references or (image.digest,):
                output.line(reference)
    else:
        now = time.time()
        rows = [
            (
                reference,
                output.short_digest(image.digest),
                image.architecture,
                output.size(image.size),
                output.ago(image.created_at, now),
            )
            for image in images
            for reference in image.references or (_DANGLING,)
        ]
        output.table(("REFERENCE", "DIGEST", "ARCH", "SIZE", "CREATED"), rows)
    return 0


async def inspect(session: Session, args: Arguments) -> int:
    """Print records of images."""
    async with session.runtime() as runtime:
        return await each.inspect(args.image, runtime.images.get)


async def rm(session: Session, args: Arguments) -> int:
    """Remove images; print what went away."""
    async with session.runtime() as runtime:
        removed, code = await each.each(args.image, runtime.images.remove)
    for _, things in removed:
        for thing in things:
            output.line(thing)
    return code


async def tag(session: Session, args: Arguments) -> int:
    """Give an image another name."""
    async with session.runtime() as runtime:
        await runtime.images.tag(args.image, args.name)
    output.line(args.name)
    return 0


async def login(session: Session, args: Arguments) -> int:
    """Keep a login at a registry."""
    if not args.user:
        raise UsageError("--user: name the user")
    password = await terminal.read_secret(f"Password of {args.user} at {args.registry}: ")
    async with session.runtime() as runtime:
        made = await runtime.images.login(args.registry, args.user, password, prefix=args.prefix or "")
    output.line(made.id)
    return 0


async def logins(session: Session, args: Arguments) -> int:
    """List the logins at registries."""
    async with session.runtime() as runtime:
        found = await runtime.images.logins()
    if args.json:
        output.json_value(found)
    elif args.quiet:
        for one in found:
            output.line(one.id)
    else:
        now = time.time()
        rows = ((one.id, one.registry, one.prefix, one.username, output.ago(one.created_at, now)) for one in found)
        output.table(("ID", "REGISTRY", "PREFIX", "USER", "CREATED"), rows)
    return 0


async def logout(session: Session, args: Arguments) -> int:
    """Forget logins at registries."""
    failed = False
    async with session.runtime() as runtime:
        for one in args.login:
            try:
                await runtime.images.logout(one)
            except HutchError as error:
                output.error(error)
                failed = True
            else:
                output.line(one)
    return int(failed)


async def prune(session: Session, args: Arguments) -> int:
    """Remove what nothing needs."""
    async with session.runtime() as runtime:
        freed = await runtime.images.prune(all=args.all)
    if args.json:
        output.json_value({"freed_bytes": freed})
    else:
        output.line(f"freed {output.size(freed)}")
    return 0
