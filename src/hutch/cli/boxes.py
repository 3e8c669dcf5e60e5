"""ls, inspect, start, stop, restart, pause, resume, kill, rm, logs."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from hutch.cli import each, output, terminal
from hutch.cli.parser import UsageError
from hutch.errors import HutchError
from hutch.types import BoxState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from hutch.cli.parser import Arguments
    from hutch.cli.session import Session
    from hutch.sdk.base import Box, Runtime
    from hutch.types import BoxInfo

# Boxes that one command works on at once.
_PARALLEL = 8


async def ls(session: Session, args: Arguments) -> int:
    """List boxes."""
    async with session.runtime() as runtime:
        boxes = await runtime.list(labels=dict(args.label))
    boxes = [box for box in boxes if not args.running or box.state is BoxState.RUNNING]
    if args.json:
        output.json_value(boxes)
    elif args.quiet or args.names:
        for box in boxes:
            output.line((box.name or box.id) if args.names else box.id)
    else:
        now = time.time()
        output.table(("ID", "NAME", "IMAGE", "STATE", "CREATED", "COMMAND"), (_row(box, now) for box in boxes))
    return 0


def _row(box: BoxInfo, now: float) -> tuple[str, ...]:
    state = str(box.state)
    if box.exit_code is not None and box.state in (BoxState.STOPPED, BoxState.FAILED):
        state += f" ({box.exit_code})"
    command = output.shorten(shlex.join(box.command or ()), 40)
    return (
        box.id[: output.SHORT_ID],
        box.name or "",
        box.image,
        state,
        output.ago(box.created_at, now),
        command,
    )


async def inspect(session: Session, args: Arguments) -> int:
    """Print records of boxes; what is found is printed even when another is not."""
    async with session.runtime() as runtime:

        async def info(name: str) -> BoxInfo:
            return await (await runtime.get(name)).info()

        return await each.inspect(args.box, info)


async def start(session: Session, args: Arguments) -> int:
    """Start boxes."""
    return await _each(session, args.box, lambda box: box.start())


async def stop(session: Session, args: Arguments) -> int:
    """Stop boxes."""
    return await _each(session, args.box, lambda box: box.stop(timeout=args.timeout))


async def restart(session: Session, args: Arguments) -> int:
    """Restart boxes."""
    return await _each(session, args.box, lambda box: box.restart(timeout=args.timeout))


async def pause(session: Session, args: Arguments) -> int:
    """Freeze boxes."""
    return await _each(session, args.box, lambda box: box.pause())


async def resume(session: Session, args: Arguments) -> int:
    """Let paused boxes go on."""
    return await _each(session, args.box, lambda box: box.resume())


async def kill(session: Session, args: Arguments) -> int:
    """Send a signal to boxes."""
    return await _each(session, args.box, lambda box: box.kill(args.signal))


async def rm(session: Session, args: Arguments) -> int:
    """Remove boxes."""
    if bool(args.box) == args.all:
        raise UsageError("name the boxes to remove, or give --all")
    if not args.all:
        return await _each(session, args.box, lambda box: box.remove(force=args.force))
    async with session.runtime() as runtime:
        boxes = await runtime.list()
        if boxes and not args.force:
            running = sum(box.state is BoxState.RUNNING for box in boxes)
            question = f"Remove all {len(boxes)} boxes ({running} of them running) with their files? [y/N] "
            if not await _agreed(question):
                output.note("nothing was removed")
                return 1
        return await _for_each(runtime, [box.id for box in boxes], lambda box: box.remove(force=True))


async def _agreed(question: str) -> bool:
    sys.stderr.write(question)
    sys.stderr.flush()
    answer = await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
    return answer.strip().lower() in ("y", "yes")


async def _each(session: Session, names: Iterable[str], action: Callable[[Box], Awaitable[None]]) -> int:
    async with session.runtime() as runtime:
        return await _for_each(runtime, names, action)


async def _for_each(runtime: Runtime, names: Iterable[str], action: Callable[[Box], Awaitable[None]]) -> int:
    """Do it with every box, several at a time; print each name when it is done, or why it failed."""
    slots = anyio.CapacityLimiter(_PARALLEL)
    failed = []

    async def one(name: str) -> None:
        async with slots:
            try:
                await action(await runtime.get(name))
            except HutchError as error:
                output.error(error)
                failed.append(name)
            else:
                output.line(name)

    async with anyio.create_task_group() as tasks:
        for name in dict.fromkeys(names):
            tasks.start_soon(one, name)
    return int(bool(failed))


async def logs(session: Session, args: Arguments) -> int:
    """Print a box's log: its output on our output, its errors on our errors, byte for byte."""
    descriptors = {"stdout": terminal.STDOUT, "stderr": terminal.STDERR}
    stamps = {stream: _Stamps() for stream in descriptors}
    empty = True
    async with session.runtime() as runtime:
        box = await runtime.get(args.box)
        async with contextlib.aclosing(box.logs(follow=args.follow, tail=args.tail)) as entries:  # type: ignore[type-var]  # an async generator
            async for entry in entries:
                empty = False
                data = stamps[entry.stream].stamp(entry.time, entry.data) if args.timestamps else entry.data
                await terminal.write(descriptors[entry.stream], data)
        if empty:
            info = await box.info()
            why = "its main command wrote nothing" if info.command is not None else "it has no main command"
            output.note(f"box {args.box} has no log: {why} (what `hutch exec` runs is not logged)")
    return 0


class _Stamps:
    """Puts the time in front of every line of one stream, also when lines come in pieces."""

    def __init__(self) -> None:
        self._at_start = True

    def stamp(self, when: float, data: bytes) -> bytes:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when))
        prefix = f"{clock}.{int(when * 1000) % 1000:03d}Z ".encode()
        stamped = data.replace(b"\n", b"\n" + prefix)
        if self._at_start:
            stamped = prefix + stamped
        self._at_start = data.endswith(b"\n")
        return stamped.removesuffix(prefix) if self._at_start else stamped
