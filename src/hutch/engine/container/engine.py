"""The container engine: starts, observes and removes boxes. How a box is built stands in agent/launch.c."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from hutch.engine import record, trees
from hutch.engine.base import NO_FORK, BoxPlan, Capability, Observed, Started, Upper, Usage
from hutch.engine.container import upper
from hutch.engine.container.launch import configuration
from hutch.engine.launcher import Launch, check_plan, open_logs
from hutch.errors import (
    EngineError,
    InvalidStateError,
    UnsupportedError,
)
from hutch.host import mapping
from hutch.host.binary import agent_path
from hutch.host.cgroup import Group

if TYPE_CHECKING:
    import socket

START_SECONDS = 30.0
KILL_SECONDS = 10.0


class ContainerEngine:
    """Boxes as namespace containers, as root or as an ordinary user. Implements `hutch.engine.base.Engine`."""

    name = "container"

    def __init__(self, *, agent: Path | None = None) -> None:
        """``agent``: the native program, by default the one of the installation."""
        self._agent = agent
        self.capabilities = frozenset(
            {Capability.SHARED_MEMORY} | ({Capability.PAUSE} if Group.named("probe").can_freeze() else set())
        )

    def check(self) -> None:
        """Raise `EngineError` when this machine cannot run boxes."""
        agent_path() if self._agent is None else None
        if not Path("/proc/self/ns/user").exists():
            raise EngineError("this kernel has no user namespaces (CONFIG_USER_NS)")
        limit = int(Path("/proc/sys/user/max_user_namespaces").read_text())
        if limit == 0:
            raise EngineError("user namespaces are switched off: set the sysctl user.max_user_namespaces above 0")

    async def start(self, plan: BoxPlan) -> Started:
        """See `hutch.engine.base.Engine.start`."""
        check_plan(plan)
        if self.observe(plan.directory).running:
            raise InvalidStateError(f"box {plan.box_id} runs already")
        if (plan.directory / "run").exists():
            await self.kill(plan.directory)  # what an end without us has left
        ids = mapping.current()
        group = Group.named(plan.box_id)
        try:
            (plan.directory / "run").mkdir(mode=0o700, exist_ok=True)
            await upper.prepare(plan.directory, plan.limits.disk_gb, ids)
            record.write(plan.directory, record.Record(group=group))
            unenforced = group.create(plan.limits)
            pids = plan.limits.pids if "pids" in unenforced and ids.rootless else None
            if pids is not None:
                unenforced = tuple(name for name in unenforced if name != "pids")
            if plan.limits.disk_gb is not None and not upper.limited(plan.directory):
                unenforced += ("disk",)
            text = configuration(plan, ids, group.doors(), pids=pids)
            with anyio.fail_after(START_SECONDS):
                pid = await self._launch(plan.directory, group, ids, text)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self.kill(plan.directory)
            if isinstance(error, TimeoutError):
                raise EngineError(f"box {plan.box_id} did not start within {START_SECONDS:g} s") from error
            if isinstance(error, OSError):
                raise EngineError(f"box {plan.box_id} cannot start: {error}") from error
            raise
        return Started(pid=pid, unenforced=unenforced)

    async def _launch(self, directory: Path, group: Group, ids: mapping.Mapping, text: bytes) -> int:
        descriptors: list[int] = []
        listener = record.listen(directory)
        try:
            descriptors = [listener.fileno(), *open_logs(directory)]
            launch = Launch(self._agent or agent_path(), "launch", ids.outer or ())
            try:
                launch.hand_over(text, descriptors)
                process = await launch.until(b"R")
                record.write(directory, record.Record(group=group, process=process))
                await launch.commit()
            finally:
                with anyio.CancelScope(shield=True):
                    await launch.close()
        finally:
            listener.close()
            for fd in descriptors[1:]:
                os.close(fd)
        if not process.alive():
            raise EngineError("the box cannot start: its agent ended at once")
        return process.pid

    async def connect(self, directory: Path) -> socket.socket:
        """See `hutch.engine.base.Engine.connect`."""
        return await record.connect_patiently(directory)

    def observe(self, directory: Path) -> Observed:
        """See `hutch.engine.base.Engine.observe`."""
        entry = record.read(directory)
        if entry is None or entry.process is None or not entry.process.runs():
            return Observed(running=False)
        return Observed(running=True, pid=entry.process.pid)

    def last_words(self, directory: Path) -> str:
        """See `hutch.engine.base.Engine.last_words`. The kernel does not tell."""
        return ""

    def network(self, directory: Path) -> int | None:
        """See `hutch.engine.base.Engine.network`: PID 1 is in it."""
        entry = record.read(directory)
        return None if entry is None or entry.process is None else entry.process.pidfd()

    async def link(self, directory: Path) -> None:
        """See `hutch.engine.base.Engine.link`: they always do."""

    async def kill(self, directory: Path) -> None:
        """See `hutch.engine.base.Engine.kill`. Raises `EngineError` when something does not go away."""
        with anyio.CancelScope(shield=True):
            # Without a record that can be read, what still runs is found in the groups that bear the box's name.
            entry = record.read(directory) or record.Record(group=Group.named(directory.name))
            entry.group.release()
            if entry.process is not None and not await entry.process.kill(KILL_SECONDS):
                raise EngineError(f"process {entry.process.pid} of the box in {directory} does not end")
            await entry.group.remove()
            await upper.released(directory, KILL_SECONDS)
            record.clear(directory)

    async def freeze(self, directory: Path) -> None:
        """See `hutch.engine.base.Engine.freeze`. Raises `UnsupportedError` where nothing can freeze, `EngineError`."""
        await self._set_frozen(directory, True)

    async def thaw(self, directory: Path) -> None:
        """See `hutch.engine.base.Engine.thaw`."""
        await self._set_frozen(directory, False)

    async def save(self, directory: Path, target: Path) -> None:
        """See `hutch.engine.base.Engine.save`: processes of the host's kernel cannot be saved."""
        raise UnsupportedError(NO_FORK)

    async def _set_frozen(self, directory: Path, frozen: bool) -> None:
        entry = record.read(directory)
        if entry is None or entry.process is None or not entry.process.alive():
            raise EngineError(f"the box in {directory} does not run")
        if entry.group.can_freeze():
            await entry.group.freeze(frozen)
        elif frozen:
            raise UnsupportedError(
                "a running box cannot be held still here, no freezer control group is writable; stop the box first"
            )

    def usage(self, directory: Path) -> Usage:
        """See `hutch.engine.base.Engine.usage`."""
        entry = record.read(directory)
        if entry is None or entry.process is None or not entry.process.alive():
            return Usage()
        measured = entry.group.usage()
        return Usage(
            memory_bytes=measured.memory_bytes,
            memory_limit_bytes=measured.memory_limit_bytes,
            cpu_seconds=measured.cpu_seconds,
            pids=measured.pids,
            oom_kills=measured.oom_kills,
        )

    def upper(self, directory: Path) -> Upper:
        """See `hutch.engine.base.Engine.upper`."""
        return upper.kind(directory)

    async def move_upper(self, directory: Path, target: Path) -> None:
        """See `hutch.engine.base.Engine.move_upper`. Raises `StorageError`."""
        await upper.move(directory, target)

    async def copy_upper(self, directory: Path, target: Path) -> None:
        """See `hutch.engine.base.Engine.copy_upper`. Raises `StorageError`."""
        await upper.copy(directory, target)

    async def reset_upper(self, directory: Path) -> None:
        """See `hutch.engine.base.Engine.reset_upper`. Raises `StorageError`."""
        await upper.reset(directory)

    async def upper_size(self, directory: Path) -> int:
        """See `hutch.engine.base.Engine.upper_size`."""
        return await upper.size(directory)

    async def tree_size(self, path: Path) -> int:
        """See `hutch.engine.base.Engine.tree_size`."""
        return await trees.tree_size(path)

    async def remove_tree(self, path: Path) -> None:
        """See `hutch.engine.base.Engine.remove_tree`. Raises `StorageError`."""
        await trees.remove_tree(path)

    async def copy_tree(self, source: Path, target: Path) -> None:
        """See `hutch.engine.base.Engine.copy_tree`. Raises `StorageError`."""
        await trees.copy_tree(source, target)
