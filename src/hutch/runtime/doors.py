"""What a server needs of a box of this machine, beyond `hutch.sdk.base`: executions that nobody in this process
watches, for clients who watch by connections of their own."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from hutch.core import agentproto as proto
from hutch.core import ids
from hutch.errors import HutchError, InvalidArgumentError
from hutch.runtime import logs, starting
from hutch.runtime.checks import check_size, check_start, check_text, check_whole, quoted
from hutch.runtime.ghost import haunt
from hutch.runtime.lives import MAIN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from hutch.runtime.channel import AgentChannel
    from hutch.runtime.runtime import LocalRuntime
    from hutch.state import BoxRecord


class Doors:
    """A box, by its id. `hutch.sdk.remote_doors.RemoteDoors` has the same doors."""

    def __init__(self, runtime: LocalRuntime, box_id: str, name: str | None) -> None:
        self.id = box_id
        self.name = name
        self._runtime = runtime
        self._lives = runtime.lives
        self._channels = runtime.channels
        # Whether a memory limit is enforced, so that counting OOM kills makes sense; known once the box was used.
        self._counts_oom = False

    async def launch(
        self,
        exec_id: str,
        command: tuple[str, ...],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tty: tuple[int, int] | None = None,
        stdin: bool = False,
        timeout: float | None = None,
        kill_after: float = 2.0,
        linger: float | None = 0.3,
        file_op: proto.FileOp | None = None,
        path: str = "",
    ) -> tuple[int, int | None]:
        """Start a command (or a file operation) under an id of the caller's choice, without watching it, and return its
        pid and what `oom_kills` was before. The same id twice starts nothing twice: that raises `InvalidStateError`."""
        if not ids.is_id(exec_id):
            raise InvalidArgumentError(f"{quoted(exec_id)} is not an execution id: {ids.LENGTH} letters and digits")
        check_start(command, env, cwd, user, timeout, kill_after, linger, file_op)
        if tty is not None:
            check_size(*tty)
        channel = await self._lives.channel(self.id)
        before = self.oom_kills()
        pid, _ = await starting.start(
            self._channels,
            self.id,
            channel,
            exec_id,
            command,
            env=env,
            cwd=cwd,
            user=user,
            tty=tty,
            stdin=stdin,
            timeout=timeout,
            kill_after=kill_after,
            linger=linger,
            file_op=file_op,
            path=path,
        )
        return pid, before

    async def launch_main(self, rows: int, cols: int) -> None:
        """Start the box for someone who will watch its main command, with a terminal of this size if it has one.
        Raises `InvalidStateError` when the box runs already, `InvalidArgumentError` without a main command."""
        check_size(rows, cols)
        self._check_job()

        @contextlib.asynccontextmanager
        async def unwatched(channel: AgentChannel) -> AsyncIterator[tuple[tuple[int, int], None]]:
            yield (rows, cols), None

        await self._lives.start_watched(self.id, unwatched)

    async def connect_agent(self, exec_id: str) -> socket.socket:
        """Return a connected, non-blocking socket to the agent, for one watcher of an execution that exists. Raises
        `NotFoundError`, `SessionReapedError` or what the box's state demands."""
        check_text("the id of an execution", exec_id)
        if exec_id == MAIN and (ghost := await self._ghost()) is not None:
            return ghost
        try:
            channel = await self._lives.channel(self.id, start=False)
            await starting.find(channel, exec_id, self.name or self.id)
            return await self._channels.connect(self.id)
        except HutchError:
            # With the end of its main command the whole box goes, perhaps just now.
            if exec_id == MAIN and (ghost := await self._ghost()) is not None:
                return ghost
            raise

    async def signal_execution(self, exec_id: str, signum: int) -> None:
        """Send a signal to an execution that nobody here watches. Raises `InvalidStateError` after its end."""
        check_text("the id of an execution", exec_id)
        check_whole("signal", signum, 1, 64)
        channel = await self._lives.channel(self.id, start=False)
        await starting.find(channel, exec_id, self.name or self.id)
        await channel.request(lambda req: proto.signal(exec_id, signum, req=req))

    def oom_kills(self) -> int | None:
        """How often the kernel has ended a process of the running box for want of memory; ``None`` where no limit is
        enforced."""
        self._counts_oom = self._channels.settings(self.id).spec.limits.memory_mib is not None
        return self._oom_kills(self._runtime.home.box(self.id))

    async def log_records(self) -> list[logs.Record]:
        """What the log of the main command holds, oldest first."""
        self._runtime.store.box(self.id)
        return logs.read(self._runtime.home.box(self.id))

    # What the box shares with its doors.

    def _check_job(self) -> BoxRecord:
        """The record of a box with a main command. Raises `InvalidArgumentError` for another one."""
        record = self._runtime.store.box(self.id)
        if record.command is None:
            raise InvalidArgumentError(f"box {self.name or self.id} has no main command to attach to")
        return record

    def _oom_kills(self, directory: Path) -> int | None:
        if not self._counts_oom:
            return None
        return self._runtime.engines.of(self._channels.settings(self.id)).usage(directory).oom_kills

    async def _ghost(self) -> socket.socket | None:
        """The agent of a box that has ended, as far as its main command goes."""
        directory = self._runtime.home.box(self.id)
        if (await self._runtime.records.info(self.id)).pid or logs.exit_record(directory) is None:
            return None
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        self._runtime.spawn(haunt, theirs, directory, MAIN)
        return ours
