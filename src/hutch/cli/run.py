"""run, create, exec, attach: commands in boxes."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import anyio
import msgspec

from hutch.cli import output, terminal
from hutch.cli.connection import Connection
from hutch.cli.network import network_policy
from hutch.cli.parser import UsageError
from hutch.cli.progress import Display
from hutch.errors import InvalidArgumentError, NotFoundError
from hutch.types import Mount, PublishedPort, Secret

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hutch.cli.parser import Arguments
    from hutch.cli.session import Session
    from hutch.sdk.base import Box, Runtime

# Taking a box away after `run`; the runtime's own deadlines are shorter.
_CLEAR_SECONDS = 30.0


async def run(session: Session, args: Arguments) -> int:
    """Make a box and run its main command."""
    if args.detach and args.timeout is not None:
        raise UsageError("--timeout: needs someone who waits, so it cannot be combined with --detach")
    if not args.detach:
        _check_terminal(args.tty)
    async with session.runtime() as runtime:
        box = await _create(runtime, args, tuple(args.command), detach=args.detach)
        if args.detach:
            await _start(box, remove=args.rm)
            output.line(box.id)
            return 0
        connection = Connection(session, tty=args.tty, stdin=args.interactive, timeout=args.timeout, end_in_time=True)
        async with _cleared_away(box, connection, remove=args.rm):
            rows, cols = terminal.size(terminal.STDIN)
            return await connection.serve(
                lambda out, err: box.start_attached(rows=rows, cols=cols, stdout=out, stderr=err)
            )


async def create(session: Session, args: Arguments) -> int:
    """Make a box."""
    async with session.runtime() as runtime:
        box = await _create(runtime, args, tuple(args.command) or None, detach=True)
        output.line(box.id)
        return 0


async def exec_(session: Session, args: Arguments) -> int:
    """Run a command in a box."""
    if args.detach and (args.interactive or args.tty):
        raise UsageError("--detach: cannot be combined with -i or -t")
    _check_terminal(args.tty)
    rows, cols = terminal.size(terminal.STDIN)
    common = {"env": _environment(args), "cwd": args.workdir, "user": args.user, "timeout": args.timeout}
    async with session.runtime() as runtime:
        box = await runtime.get(args.box)
        if args.detach:
            execution = await box.exec(*args.command, **common)
            await execution.close()
            output.line(execution.id)
            return 0
        connection = Connection(session, tty=args.tty, stdin=args.interactive, timeout=args.timeout)
        return await connection.serve(
            lambda out, err: box.exec(
                *args.command,
                **common,
                tty=args.tty,
                rows=rows,
                cols=cols,
                stdin=args.interactive,
                stdout=out,
                stderr=err,
            )
        )


async def attach(session: Session, args: Arguments) -> int:
    """Connect to an execution that is there already."""
    async with session.runtime() as runtime:
        box = await runtime.get(args.box)
        info = await box.info()
        tty, stdin = info.tty, info.open_stdin
        if args.execution:
            known = {execution.id: execution for execution in await box.executions()}
            if args.execution not in known:
                raise NotFoundError(f"box {args.box} has no execution {args.execution!r}")
            tty, stdin = known[args.execution].tty, True
        stdin = stdin and not args.no_stdin
        tty = tty and os.isatty(terminal.STDIN)
        connection = Connection(session, tty=tty, stdin=stdin)
        return await connection.serve(lambda out, err: box.attach(args.execution or "main", stdout=out, stderr=err))


@contextlib.asynccontextmanager
async def _cleared_away(box: Box, connection: Connection, *, remove: bool) -> AsyncIterator[None]:
    """Leave nothing running after a `run` in the foreground, however it ends, unless the caller detached."""
    finished = False
    try:
        yield
        finished = True
    finally:
        with (
            anyio.CancelScope(shield=True),
            anyio.move_on_after(_CLEAR_SECONDS),
            contextlib.suppress(NotFoundError),
        ):
            if connection.detached:
                await box.detach()
            elif remove:
                await box.remove(force=True)
            elif finished:
                await box.wait()
            else:
                await box.stop(timeout=2)


async def _start(box: Box, *, remove: bool) -> None:
    try:
        await box.start()
    except BaseException:
        if remove:
            with anyio.CancelScope(shield=True):
                await box.remove(force=True)
        raise


async def _create(runtime: Runtime, args: Arguments, command: tuple[str, ...] | None, *, detach: bool) -> Box:
    entrypoint = None if args.entrypoint is None else tuple(filter(None, [args.entrypoint]))
    with Display(f"pulled {args.image}", quiet=args.quiet) as display:
        return await runtime.create(
            args.image,
            name=args.name,
            command=command,
            entrypoint=entrypoint,
            env=_environment(args),
            workdir=args.workdir,
            user=args.user,
            labels=dict(args.label),
            cpus=args.cpus,
            memory_mib=args.memory,
            disk_gb=args.disk,
            pids=args.pids or None,
            mounts=[Mount(**mount._asdict()) for mount in args.volume],
            network=msgspec.structs.replace(
                network_policy(args.network, args.allow_net),
                send_rate=args.send_rate or None,
                receive_rate=args.receive_rate or None,
            ),
            secrets=[Secret(**secret._asdict(), pass_opaque=args.pass_opaque) for secret in args.secret],
            ports=[PublishedPort(**port._asdict()) for port in args.publish],
            isolation=args.isolation,
            auto_remove=args.rm,
            auto_resume=args.auto_resume,
            detach=detach,
            hostname=args.hostname,
            tty=args.tty,
            open_stdin=args.interactive,
            stop_signal=args.stop_signal,
            platform=args.platform,
            pull=args.pull,
            progress=display,
        )


def _environment(args: Arguments) -> dict[str, str]:
    pairs = [pair for file in args.env_file for pair in file]
    return dict([*pairs, *(pair for pair in args.env if pair)])


def _check_terminal(wanted: bool) -> None:
    if wanted and not os.isatty(terminal.STDIN):
        raise InvalidArgumentError("-t needs a terminal, and standard input is not one; leave -t out")
