"""Starting one machine: descriptors, configuration, and what is said to the emulator and to the guest on the way."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import msgspec

from hutch.engine import record
from hutch.engine.launcher import Launch, encode, hosts_file, open_logs, resolver_file
from hutch.engine.vm import machine, nic, qmp
from hutch.errors import EngineError, InvalidArgumentError, UpstreamUnavailableError
from hutch.host import mapping

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from hutch.engine.base import BoxPlan, MountPlan
    from hutch.engine.vm.machine import Plan, Shape
    from hutch.host.mapping import Mapping
    from hutch.host.proc import Process

CONSOLE = "console.log"
USER = mapping.ROOT_BASE - 1
"""As root, emulators run as this user, which is nobody else's."""
MOVE_SECONDS = 120.0
"""How long a state may take on its way from or to a file: gigabytes, when it is that of a box."""
_WORDS_SECONDS = 1.0
_READY, _UP, _RESUME = b"B", b"R", b"V"
_RESUME_MAX = 32_760
"""What fits into one frame of the line (docs/agent-protocol.md)."""


class Files(msgspec.Struct, frozen=True, kw_only=True):
    """Descriptors of a machine. ``disk``: base, frozen images, its own one. The caller closes them."""

    memory: int | None = None
    disk: Sequence[int] = ()


class Machine:
    """A machine that is being started."""

    def __init__(self, launch: Launch, directory: Path) -> None:
        self._launch = launch
        self._directory = directory

    async def booted(self) -> None:
        """Wait until a guest that boots is ready to be resumed. Its card has no link from now on (`nic`). Raises
        `EngineError`."""
        await self._launch.until(_READY)
        async with qmp.monitor(self._directory) as monitor:
            await nic.plug(monitor, up=False)

    async def save(self, state: int) -> None:
        """Stop the guest and save its state to a file; shared memory is part of it already. Raises `EngineError`."""
        await self._move("migrate", state, before="stop")

    async def load(self, state: int) -> None:
        """Load a state from a file and let the guest run. Raises `EngineError`."""
        await self._move("migrate-incoming", state, after="cont")

    async def _move(self, command: str, state: int, *, before: str = "", after: str = "") -> None:
        try:
            async with qmp.monitor(self._directory, seconds=MOVE_SECONDS) as monitor:
                if before:
                    await monitor.command(before)
                await monitor.move(command, state)
                if after:  # not earlier: a guest that goes on before its state is there never answers
                    await monitor.command(after)
        except (EngineError, UpstreamUnavailableError):
            with anyio.move_on_after(_WORDS_SECONDS):
                await self._launch.until(_UP)  # an emulator that has ended has told the launcher why
            raise

    async def resume(self, plan: BoxPlan) -> Process:
        """Make the guest the box, and return the keeper: PID 1 of the machine. Raises `EngineError`."""
        records = encode(_resume_records(plan))
        if len(records) > _RESUME_MAX:
            raise InvalidArgumentError(f"the names and mount targets of box {plan.box_id} are too long for a VM")
        self._launch.send(_RESUME + records)
        return await self._launch.until(_UP)

    async def commit(self) -> None:
        """See `hutch.engine.launcher.Launch.commit`."""
        await self._launch.commit()


@contextlib.asynccontextmanager
async def launching(
    agent: Path,
    directory: Path,
    shape: Shape,
    plan: Plan,
    files: Files,
    doors: Iterable[str] = (),
    mounts: Sequence[MountPlan] = (),
) -> AsyncIterator[Machine]:
    """Start a machine, whose folder is ``directory``, and end it at the end of the block unless it was committed.

    Raises `EngineError`.
    """
    ids = mapping.current()
    outer = ids.outer or ()
    if outer and not mounts:  # one id is enough for it
        outer = (f"0 {os.geteuid()} 1", f"0 {os.getegid()} 1")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(record.listen(directory))
        monitor = stack.enter_context(record.listen(directory, qmp.SOCKET))
        own = [*open_logs(directory), _open_console(directory)]
        for fd in own:
            stack.callback(os.close, fd)
        descriptors = [listener.fileno(), *own]
        if files.memory is not None:
            descriptors.append(files.memory)
        descriptors += [monitor.fileno(), *files.disk]
        launch = Launch(agent, "vm", outer)
        try:
            records = [
                *_configuration(directory, shape, plan, doors, rootless=ids.rootless),
                ("file_max", str(_file_max(shape, files))),
                *_mount_records(mounts, ids),
            ]
            launch.hand_over(encode(records), descriptors)
            # So that nobody waits for a monitor when its emulator has ended.
            monitor.close()
            yield Machine(launch, directory)
        finally:
            with anyio.CancelScope(shield=True):
                await launch.close()


def _open_console(directory: Path) -> int:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(directory / CONSOLE, flags, 0o600)


def _configuration(
    directory: Path, shape: Shape, plan: Plan, doors: Iterable[str], *, rootless: bool
) -> list[tuple[str, str]]:
    records = [("stage", str(directory / "run"))]
    records += [("bind", path) for path in machine.host_files(shape)]
    records += [("argument", argument) for argument in machine.arguments(shape, plan)]
    records += [("cgroup", str(door)) for door in doors]
    if not rootless:
        group = Path("/dev/kvm").stat().st_gid if shape.kvm else USER
        records.append(("user", f"{USER}:{USER}:{group}"))
    if plan.memory:
        records.append(("memory", ""))
    return records


def _file_max(shape: Shape, files: Files) -> int:
    """Return how large a file the emulator may need to make, in bytes: its disk, with what such an image is larger than
    what is in it, or its memory, when it is saved. One that was taken over fills no more of the host's disk."""
    disk = os.fstat(files.disk[0]).st_size if files.disk else 0
    return disk + disk // 8 + (shape.memory_mib << 20) + (1 << 30)


def _mount_records(mounts: Sequence[MountPlan], ids: Mapping) -> list[tuple[str, str]]:
    """Tell the launcher what the machine's files are served from, and whose they are: the ids are a container's."""
    if not mounts:
        return []
    maps = [("uid_map", ids.uid_map), ("gid_map", ids.gid_map)]
    return maps + [(_mount_key(mount), str(mount.source)) for mount in mounts]


def _mount_key(mount: MountPlan) -> str:
    return "mount_ro" if mount.read_only else "mount_rw"


def _resume_records(plan: BoxPlan) -> list[tuple[str, str]]:
    records = [
        ("entropy", secrets.token_bytes(64).hex()),
        ("time", str(time.time_ns())),
        ("hostname", plan.hostname),
        ("etc/hostname", plan.hostname),
        ("etc/hosts", hosts_file(plan.hostname)),
        ("etc/resolv.conf", resolver_file(plan.nameserver)),
        ("etc/machine-id", f"{_machine_id(plan.box_id)}\n"),
    ]
    records += [(_mount_key(mount), mount.target) for mount in plan.mounts]
    if plan.limits.pids is not None:
        records.append(("pids", str(plan.limits.pids)))
    return records


def _machine_id(box_id: str) -> str:
    """The same at each start of a box, another for each box."""
    return hashlib.sha256(f"hutch machine {box_id}".encode()).hexdigest()[:32]
