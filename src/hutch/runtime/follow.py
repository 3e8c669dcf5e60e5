"""The log of a box's main command: what was written, and what is being written."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from typing import TYPE_CHECKING, Protocol

import anyio

from hutch.core import agentproto as proto
from hutch.errors import HutchError, RuntimeClosedError
from hutch.runtime import logs
from hutch.runtime.checks import check_whole
from hutch.runtime.lives import MAIN
from hutch.types import BoxInfo, LogEntry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hutch.core.sinks import Sink
    from hutch.runtime.execution import LocalExecution


class Logged(Protocol):
    """A box, as far as its log goes."""

    async def info(self) -> BoxInfo: ...

    async def log_records(self) -> list[logs.Record]: ...

    async def attach(
        self, exec_id: str, *, after: tuple[int, int], stdout: Sink | None, stderr: Sink | None
    ) -> LocalExecution: ...


async def follow_log(
    box: Logged, spawn: Callable[..., None], *, follow: bool, tail: int | None
) -> AsyncIterator[LogEntry]:
    """Yield what the log holds (``tail``: its last lines only) and, to ``follow``, what comes until the end."""
    if tail is not None:
        check_whole("tail", tail, 0, sys.maxsize)
    records = await box.log_records()
    for entry in records if tail is None else logs.tail(records, tail):
        yield entry.entry()
    if not follow or (await box.info()).command is None:
        return
    ends = logs.ends(records)
    send, receive = anyio.create_memory_object_stream[LogEntry](16)

    async def put(stream: int, data: bytes) -> None:
        await send.send(LogEntry(time=time.time(), stream=logs.NAMES[stream], data=data))

    async def close_at_end(execution: LocalExecution) -> None:
        try:
            with contextlib.suppress(HutchError):
                await execution.wait()
        finally:
            send.close()

    try:
        execution = await box.attach(
            MAIN,
            after=(ends[proto.STDOUT], ends[proto.STDERR]),
            stdout=functools.partial(put, proto.STDOUT),
            stderr=functools.partial(put, proto.STDERR),
        )
    except BaseException as error:
        send.close()
        receive.close()
        if not isinstance(error, HutchError) or isinstance(error, RuntimeClosedError):
            raise
        # It has ended meanwhile, so the log is complete.
        for entry in logs.beyond(await box.log_records(), ends):
            yield entry.entry()
        return
    spawn(close_at_end, execution)
    try:
        async for live in receive:
            yield live
        execution.check_open()  # the end of the log, or of the runtime?
    finally:
        receive.close()
        await execution.close()
