"""The executions that this server knows: who watches them, how they ended, and what is still owed to a client.

The truth is in the box's agent, which also keeps the output; this is what clients of this server need beyond it. After
a restart of the server it is rebuilt from what the box tells.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import anyio
import msgspec

from hutch.errors import (
    AlreadyExistsError,
    InvalidStateError,
    NotFoundError,
    SessionReapedError,
    StoppedError,
)
from hutch.types import BoxState, ExecInfo, ExecState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from anyio.abc import TaskGroup

    from hutch.sdk.base import Box, Execution
    from hutch.server.attach import Attachment
    from hutch.server.settings import ServerSettings

MAIN = "main"
# A client that holds an execution has so many seconds to show that it lives when another one wants it.
_PROBE_SECONDS = 3.0
# The agent serves at most 64 connections; each watcher has one.
_WATCHERS = 56
# How many questions to one agent may be on their way: each answer names all that it knows (40 KiB), and it ends a
# connection on which more than 1 MiB of answers wait.
_QUESTIONS = 8


class End(msgspec.Struct, frozen=True):
    """How an execution ended; ``at`` in Unix seconds."""

    state: ExecState
    exit_code: int
    at: float


class Entry:
    """One execution."""

    def __init__(self, box_id: str, exec_id: str, *, command: str = "", tty: bool = False, started_at: float) -> None:
        self.box_id = box_id
        self.id = exec_id
        self.command = command
        self.tty = tty
        self.started_at = started_at
        self.end: End | None = None
        # The client that is attached.
        self.client: Attachment | None = None
        # One that was cut off: it keeps hold of what it had not delivered until it comes back.
        self.cut: Attachment | None = None

    @property
    def owed(self) -> bool:
        """Whether a client that is, or was just now, attached has yet to receive something."""
        return self.cut is not None or (self.client is not None and not self.client.delivered)


class Executions:
    """See the module."""

    def __init__(self, settings: ServerSettings, tasks: TaskGroup) -> None:
        self._settings = settings
        self._tasks = tasks
        self._entries: dict[tuple[str, str], Entry] = {}
        self._watchers: dict[str, anyio.Semaphore] = {}
        self._questions: dict[str, anyio.CapacityLimiter] = {}

    def add(self, box: Box, exec_id: str, command: Sequence[str], *, tty: bool) -> Entry:
        """A command was started through this server."""
        text = " ".join(command)[:4096]
        entry = Entry(box.id, exec_id, command=text, tty=tty, started_at=time.time())
        self._entries[box.id, exec_id] = entry
        return entry

    async def find(self, box: Box, exec_id: str) -> Entry:
        """Find an execution of a box, with its end if it has come to it. Raises `NotFoundError` for one that never
        was, `SessionReapedError` for one whose log is gone."""
        if exec_id == MAIN:
            return await self._main(box)
        entry = self._entries.get((box.id, exec_id))
        if entry is None or entry.end is None:
            entry = await self._looked_up(box, exec_id, entry)
        kept = self._settings.keep_finished_seconds
        if entry.end is not None and not entry.owed and time.time() - entry.end.at > kept:
            raise SessionReapedError(f"execution {exec_id} ended long ago and its log was released; start a new one")
        return entry

    async def of_box(self, box: Box) -> list[Entry]:
        """All executions of a box that are known, oldest first."""
        for info in await self.running_or_recent(box) or ():
            self._note(box, info)
        found = [entry for (box_id, _), entry in self._entries.items() if box_id == box.id]
        return sorted(found, key=lambda entry: entry.started_at)

    @contextlib.asynccontextmanager
    async def control(self, box: Box, entry: Entry) -> AsyncIterator[Execution]:
        """A handle to signal or resize an execution. Raises `InvalidStateError` when it has ended."""
        if entry.end is not None:
            raise InvalidStateError(f"execution {entry.id} has ended")
        if entry.client is not None and entry.client.execution is not None:
            yield entry.client.execution
            return
        async with self.asking(box):
            execution = await box.attach(entry.id)
        try:
            yield execution
        finally:
            with anyio.CancelScope(shield=True):
                await execution.close()

    async def claim(self, entry: Entry, client: Attachment) -> None:
        """Make the client the one that is attached. Raises `AlreadyExistsError` while another one is, and lives."""
        while (other := entry.client) is not None:
            if await other.alive(_PROBE_SECONDS):
                raise AlreadyExistsError(f"execution {entry.id} has a client already; it takes one at a time")
            if entry.client is other:
                other.abort()
                entry.client = None
        entry.client = client

    def asking(self, box: Box) -> anyio.CapacityLimiter:
        """Hold this while the agent of the box is asked for an execution."""
        return self._questions.setdefault(box.id, anyio.CapacityLimiter(_QUESTIONS))

    async def running_or_recent(self, box: Box) -> list[ExecInfo] | None:
        """The executions that the box knows; ``None`` when it does not run."""
        try:
            async with self.asking(box):
                return await box.executions()
        except (StoppedError, InvalidStateError):
            return None

    async def watch_slot(self, box_id: str) -> anyio.Semaphore:
        """Wait for one of the places for watchers of a box; the caller releases it."""
        slots = self._watchers.setdefault(box_id, anyio.Semaphore(_WATCHERS))
        await slots.acquire()
        return slots

    def release(self, entry: Entry, client: Attachment, *, cut: bool) -> None:
        """The client is gone. If it was ``cut`` off, what it lacks is kept for a while."""
        if entry.client is client:
            entry.client = None
        if cut:
            if entry.cut is not None:
                entry.cut.superseded.set()
            entry.cut = client
            self._tasks.start_soon(self._hold, entry, client)
        else:
            self._tasks.start_soon(client.let_go)

    def take_over(self, entry: Entry) -> None:
        """A new client is attached to the box and will get everything that is kept: the one that was cut off need not
        hold it any longer."""
        if entry.cut is not None:
            entry.cut.superseded.set()
            entry.cut = None

    def box_ended(self, box_id: str) -> None:
        """The box was stopped: so were its executions. Those that are watched learn it from the box."""
        for (owner, _), entry in self._entries.items():
            if owner == box_id and entry.end is None and entry.client is None:
                entry.end = End(ExecState.KILLED, -9, time.time())

    def forget_box(self, box_id: str) -> None:
        """The box is gone."""
        for key in [key for key in self._entries if key[0] == box_id]:
            del self._entries[key]
        self._watchers.pop(box_id, None)
        self._questions.pop(box_id, None)

    def sweep(self) -> None:
        """Forget what ended so long ago that even the fact need not be known."""
        horizon = time.time() - 2 * self._settings.keep_finished_seconds
        for key, entry in list(self._entries.items()):
            if entry.end is not None and entry.end.at < horizon and entry.client is None and entry.cut is None:
                del self._entries[key]

    # Private methods.

    async def _hold(self, entry: Entry, client: Attachment) -> None:
        with anyio.move_on_after(self._settings.owed_seconds):
            await client.superseded.wait()
        if entry.cut is client:
            entry.cut = None
        await client.let_go()

    async def _looked_up(self, box: Box, exec_id: str, entry: Entry | None) -> Entry:
        infos = await self.running_or_recent(box)
        for info in infos or ():
            if info.id == exec_id:
                return self._note(box, info)
        if entry is not None:
            if infos is None:
                entry.end = entry.end or End(ExecState.KILLED, -9, time.time())
                return entry
            raise SessionReapedError(f"execution {exec_id} has ended and its log was released; start a new one")
        if infos is not None:  # only the agent knows whether there ever was one
            async with self.asking(box):
                execution = await box.attach(exec_id)
            await execution.close()
        raise NotFoundError(f"box {box.name or box.id} has no execution {exec_id!r:.100}")

    def _note(self, box: Box, info: ExecInfo) -> Entry:
        entry = self._entries.get((box.id, info.id))
        if entry is None:
            entry = Entry(box.id, info.id, tty=info.tty, started_at=info.started_at)
            self._entries[box.id, info.id] = entry
        if info.state is not ExecState.RUNNING and entry.end is None:
            entry.end = End(info.state, -1 if info.exit_code is None else info.exit_code, info.ended_at or time.time())
        return entry

    async def _main(self, box: Box) -> Entry:
        """The main command has one entry over all lives of the box: its end is that of the last one."""
        info = await box.info()
        if info.command is None:
            raise NotFoundError(f"box {box.name or box.id} has no main command; it was created without one")
        entry = self._entries.get((box.id, MAIN))
        if entry is None:
            started = info.started_at or info.created_at
            entry = Entry(box.id, MAIN, command=" ".join(info.command)[:4096], tty=info.tty, started_at=started)
            self._entries[box.id, MAIN] = entry
        entry.end = None
        if info.state in (BoxState.STOPPED, BoxState.FAILED) and info.started_at is not None:
            code = -9 if info.exit_code is None else info.exit_code
            entry.end = End(ExecState.KILLED if code < 0 else ExecState.COMPLETED, code, info.stopped_at or time.time())
        return entry
