"""Executions as a box's agent knows them: having it start one, once, and asking it for its records."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from hutch.core import agentproto as proto
from hutch.core import ids
from hutch.errors import InvalidArgumentError, InvalidStateError, NotFoundError, UpstreamUnavailableError
from hutch.runtime.checks import quoted
from hutch.types import ExecInfo, ExecState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hutch.runtime.channel import Channel
    from hutch.runtime.channels import Channels
    from hutch.runtime.execution import LocalExecution


async def start(
    channels: Channels,
    box_id: str,
    channel: Channel,
    exec_id: str,
    command: tuple[str, ...],
    *,
    env: Mapping[str, str] | None,
    cwd: str | None,
    user: str | None,
    tty: tuple[int, int] | None,
    execution: LocalExecution | None = None,
    **options: Any,
) -> tuple[int, bool]:
    """Have the agent start it; return its pid, and whether the outputs come by the same connection. The agent
    starts an id once: so when the connection breaks it is asked again."""
    record = channels.settings(box_id)
    variables = {**record.env, **({"TERM": "xterm"} if tty else {}), **(env or {})}
    watch = execution is not None and execution.watches_all()
    lost = exists = False
    while True:
        try:
            if exists:
                pid = await _pid_of_started(channel, exec_id)
                if pid is not None:
                    return pid, False
                lost = exists = False  # that start failed: the next has an outcome of its own
            answer = await channel.request(
                lambda req: proto.start(
                    exec_id,
                    command,
                    req=req,
                    env=variables,
                    cwd=record.workdir if cwd is None else cwd,
                    user=record.user if user is None else user,
                    tty=tty,
                    watch=watch,
                    **options,
                ),
                command=command,
                too_late=functools.partial(kill_unseen, channel, exec_id),
            )
            return answer.pid if isinstance(answer, proto.Started) else 0, watch
        except ValueError as error:
            raise InvalidArgumentError(f"the command with its environment is too long: {error}") from None
        except UpstreamUnavailableError:
            again = await channels.reconnect(box_id) if channel.closed else None
            if again is None:
                raise
            channel, lost = again, True
            if execution is not None:
                execution.move(channel)
        except InvalidStateError:
            if not lost:
                raise
            exists = True


async def records(channel: Channel) -> tuple[proto.ExecRecord, ...]:
    """What the agent knows of its executions."""
    answer = await channel.request(lambda req: proto.simple(proto.Request.LIST, req=req))
    return answer.records if isinstance(answer, proto.Execs) else ()


async def find(channel: Channel, exec_id: str, box: str) -> proto.ExecRecord:
    """One record. ``box``: what messages call the box. Raises `NotFoundError`, `SessionReapedError`."""
    for record in await records(channel):
        if record.id == exec_id:
            return record
    if ids.is_id(exec_id):  # the agent knows whether there ever was one
        await channel.request(lambda req: proto.attach(exec_id, {}, req=req))
    raise NotFoundError(f"box {box} has no execution {quoted(exec_id)}")


def info(record: proto.ExecRecord) -> ExecInfo:
    """A record as the SDK shows it."""
    return ExecInfo(
        id=record.id,
        state=_state(record),
        pid=record.pid,
        exit_code=record.status if record.exited else None,
        tty=record.tty,
        started_at=record.started_at,
        ended_at=record.ended_at if record.exited else None,
    )


def kill_unseen(channel: Channel | None, exec_id: str) -> None:
    """Send SIGKILL to an execution that nobody waits for any more, without waiting for the answer."""
    if channel is not None:
        channel.send(proto.signal(exec_id, 9, req=0))


async def _pid_of_started(channel: Channel, exec_id: str) -> int | None:
    """The pid of an execution whose start was asked for by a connection that broke; None when it failed to start, or
    was not asked for."""
    try:  # the answer waits for the outcome of a start that is under way
        await channel.request(lambda req: proto.attach(exec_id, {}, req=req))
    except NotFoundError:
        return None
    return next((record.pid for record in await records(channel) if record.id == exec_id), None)


def _state(record: proto.ExecRecord) -> ExecState:
    if not record.exited:
        return ExecState.RUNNING
    if record.timed_out:
        return ExecState.TIMED_OUT
    return ExecState.KILLED if record.status < 0 else ExecState.COMPLETED
