"""The VM engine: starts, observes and removes boxes with a kernel of their own. How stands in docs/vm.md."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import msgspec

from hutch.core import agentproto, frames
from hutch.engine import record, trees
from hutch.engine.base import BoxPlan, Capability, Observed, Started, Upper, Usage
from hutch.engine.launcher import BoxFault, check_plan
from hutch.engine.vm import disk, machine, nic, qmp
from hutch.engine.vm.kernel import Kernels
from hutch.engine.vm.launch import CONSOLE, MOVE_SECONDS, Files, launching
from hutch.engine.vm.machine import Plan, Shape
from hutch.engine.vm.template import BOOT_SECONDS, Templates, boot_seconds
from hutch.errors import (
    EngineError,
    HutchError,
    InvalidStateError,
    NetworkError,
    StorageError,
    UpstreamUnavailableError,
)
from hutch.host import kvm
from hutch.host.binary import agent_path
from hutch.host.cgroup import Group
from hutch.types import Limits, Progress

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

log = logging.getLogger("hutch.engine.vm")

RESTORE_SECONDS = 30.0
KILL_SECONDS = 10.0
SYNC_SECONDS = 5.0
LINK_SECONDS = 10.0
DEFAULT_MEMORY_MIB = 512
LEAST_MEMORY_MIB = 96
_KVM_DEVICE = "10:232"
# What an emulator may have beyond its guest's memory and processors: code that it has translated, buffers of
# connections, threads for the disk. The machine's own limits are narrower: this holds one that was taken over.
_EMULATOR_MIB, _EMULATOR_THREADS = 2048, 256
_TAIL = 2000


class VmEngine:
    """Boxes as micro-VMs under QEMU, as root or as an ordinary user. Implements `hutch.engine.base.Engine`."""

    name = "vm"
    capabilities = frozenset({Capability.PAUSE, Capability.FORK})

    def __init__(self, store: Path, *, agent: Path | None = None) -> None:
        """``store``: the folder for kernels, templates and bases of disks. ``agent``: the native program, by default
        the one of the installation."""
        self._store = store.resolve()  # templates are known by the command line, which names what is in there
        self._agent = agent or agent_path()
        self.kernels = Kernels(self._store, self._agent)
        self.templates = Templates(self._store, self._agent)

    def check(self) -> None:
        """Raise `EngineError` when this machine cannot run boxes as VMs."""
        machine.program()

    async def start(self, plan: BoxPlan) -> Started:
        """See `hutch.engine.base.Engine.start`."""
        check_plan(plan)
        if self.observe(plan.directory).running:
            raise InvalidStateError(f"box {plan.box_id} runs already")
        await self.kill(plan.directory)  # what an end without us has left
        group = Group.named(plan.box_id)
        try:
            (plan.directory / "run").mkdir(mode=0o700, exist_ok=True)
            record.write(plan.directory, record.Record(group=group))
            shape = await self.shape(plan.limits)
            bounds = Limits(pids=shape.cpus + _EMULATOR_THREADS, memory_mib=shape.memory_mib + _EMULATOR_MIB)
            group.create(bounds, devices=(_KVM_DEVICE,))
            chain = await disk.prepare(plan, self._store)
            pid = await (self._launch if plan.saved is None else self._go_on)(plan, shape, chain, group)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                await self._end(plan.directory)
            if isinstance(error, OSError):
                raise EngineError(f"box {plan.box_id} cannot start: {error}") from error
            raise
        return Started(pid=pid)

    async def set_up(self, report: Callable[[Progress], None]) -> str:
        """Make what boxes of the usual size are made from, with the kernel in use; return what they run on: ``kvm``
        or ``tcg``. Raises `EngineError`, `StorageError`."""
        self.check()
        shape = await self.shape(Limits(), report)
        report(Progress(phase="template", item=f"{shape.memory_mib} MiB"))
        try:
            await self.templates.ensure(shape)
        except EngineError as error:
            if not shape.kvm:
                raise
            shape = msgspec.structs.replace(shape, kvm=False)
            await self.templates.ensure(shape)
            _refuse_kvm(error)
        return "kvm" if shape.kvm else "tcg"

    async def uses_kvm(self) -> bool:
        """Whether VMs run on KVM here. The first answer takes up to half a second."""
        return await anyio.to_thread.run_sync(kvm.usable)

    async def preferable(self) -> bool:
        """Whether VMs are as good as containers here: at full speed, and ready."""
        return self.kernels.current() is not None and await self.uses_kvm()

    async def shape(self, limits: Limits, report: Callable[[Progress], None] | None = None) -> Shape:
        """Return the machine for these limits. Raises `EngineError`."""
        self._store.mkdir(parents=True, exist_ok=True)
        kernel = await self.kernels.ensure(report or _say)
        return Shape(
            kernel=kernel,
            kvm=await self.uses_kvm(),
            cpus=limits.cpus or 1,
            memory_mib=max(limits.memory_mib or DEFAULT_MEMORY_MIB, LEAST_MEMORY_MIB),
        )

    async def _launch(self, plan: BoxPlan, shape: Shape, chain: disk.Chain, group: Group) -> int:
        template, fault = await self.templates.obtain(shape), None
        if template is not None:
            try:
                return await self._boot(plan, shape, chain, group, template.memory, template.state)
            except BoxFault:
                raise
            except (EngineError, UpstreamUnavailableError, TimeoutError) as error:
                fault = error
                await self._end_process(plan.directory)
            finally:
                template.close()
        try:
            pid = await self._boot(plan, shape, chain, group)
            if template is not None and fault is not None:  # it was not the box's: that boots
                await self.templates.discard(template, fault)
            return pid
        except BoxFault:
            raise
        except (EngineError, TimeoutError) as error:
            if shape.kvm:
                await self._end_process(plan.directory)
                pid = await self._launch(plan, msgspec.structs.replace(shape, kvm=False), chain, group)
                _refuse_kvm(error)  # it was not the box's: that boots without
                return pid
            if isinstance(error, TimeoutError):
                said = self.last_words(plan.directory)
                told = f"; its console said: {said}" if said else ""
                raise EngineError(f"box {plan.box_id} did not start within {BOOT_SECONDS:g} s{told}") from None
            raise

    async def _go_on(self, plan: BoxPlan, shape: Shape, chain: disk.Chain, group: Group) -> int:
        """Start a box from the memory of another."""
        assert plan.saved is not None
        state = os.open(plan.saved, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return await self._boot(plan, shape, chain, group, state=state)
        except TimeoutError:
            raise EngineError(f"box {plan.box_id} did not go on within {MOVE_SECONDS:g} s") from None
        finally:
            os.close(state)

    async def _boot(
        self,
        plan: BoxPlan,
        shape: Shape,
        chain: disk.Chain,
        group: Group,
        memory: int | None = None,
        state: int | None = None,
    ) -> int:
        disks = chain.open()
        try:
            given = Files(disk=disks, memory=memory)
            incoming, mounts = state is not None, bool(plan.mounts)
            wanted = Plan(memory=memory is not None, incoming=incoming, frozen=len(chain.frozen), mounts=mounts)
            seconds = MOVE_SECONDS if plan.saved else boot_seconds(shape) if state is None else RESTORE_SECONDS
            with anyio.fail_after(seconds):
                started = launching(self._agent, plan.directory, shape, wanted, given, group.doors(), plan.mounts)
                async with started as guest:
                    await (guest.booted() if state is None else guest.load(state))
                    process = await guest.resume(plan)
                    record.write(plan.directory, record.Record(group=group, process=process))
                    if plan.saved:  # whoever dies from here on: no start goes back to where the disk has gone on
                        plan.saved.unlink()
                    await guest.commit()
        finally:
            disk.close(disks)
        return process.pid

    async def connect(self, directory: Path) -> socket.socket:
        """See `hutch.engine.base.Engine.connect`."""
        return await record.connect_patiently(directory)

    def observe(self, directory: Path) -> Observed:
        """See `hutch.engine.base.Engine.observe`."""
        entry = record.alive(directory)
        if entry is None or entry.process is None:
            return Observed(running=False)
        return Observed(running=True, pid=entry.process.pid)

    def network(self, directory: Path) -> int | None:
        """See `hutch.engine.base.Engine.network`: the emulator and its keeper are in it."""
        entry = record.read(directory)
        return None if entry is None or entry.process is None else entry.process.pidfd()

    async def link(self, directory: Path) -> None:
        """See `hutch.engine.base.Engine.link`: the card has a link, and the guest takes it."""
        try:
            async with qmp.monitor(directory, seconds=LINK_SECONDS) as monitor:
                await nic.plug(monitor, up=True)
        except (EngineError, UpstreamUnavailableError) as error:
            raise NetworkError(str(error)) from error
        try:
            async with self._asking(
                directory, agentproto.network(nic.SETTINGS, req=1), "it has no network", LINK_SECONDS
            ):
                pass
        except UpstreamUnavailableError as error:
            raise NetworkError(str(error)) from error
        except EngineError as error:
            raise NetworkError(f"{error}; `hutch setup vm` fetches a kernel that has all it needs") from error

    def last_words(self, directory: Path) -> str:
        """See `hutch.engine.base.Engine.last_words`."""
        with contextlib.suppress(OSError):
            text = (directory / CONSOLE).read_bytes()[-_TAIL:].decode(errors="replace")
            return "; ".join(line.strip() for line in text.splitlines() if line.strip())
        return ""

    async def kill(self, directory: Path) -> None:
        """See `hutch.engine.base.Engine.kill`. What the guest has written goes to its disk first, if it still can.
        Raises `EngineError` when something does not go away."""
        with anyio.CancelScope(shield=True):
            if self.observe(directory).running:
                with contextlib.suppress(HutchError):
                    if await self._runs(directory):  # otherwise it was frozen, and has written all
                        await self._sync(directory)
            await self._end(directory)

    async def freeze(self, directory: Path) -> None:
        """See `hutch.engine.base.Engine.freeze`. Its disk is complete meanwhile."""
        if not await self._runs(directory):
            return
        await self._sync(directory)
        async with qmp.monitor(directory) as monitor:
            await monitor.command("stop")

    async def save(self, directory: Path, target: Path) -> None:
        """See `hutch.engine.base.Engine.save`. The guest holds itself still, so that its state is at no byte in the
        middle of what it and the host say to each other."""
        hold = agentproto.simple(agentproto.Request.HOLD, req=1)
        try:
            state = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"cannot save the memory of the box in {directory}: {error.strerror}") from error
        try:
            async with (
                self._asking(directory, hold, "it cannot be forked"),
                qmp.monitor(directory, seconds=MOVE_SECONDS) as monitor,
            ):
                await monitor.command("stop")
                await monitor.move("migrate", state)
        finally:
            os.close(state)

    async def thaw(self, directory: Path) -> None:
        """See `hutch.engine.base.Engine.thaw`. The guest's clock, which stood still, is set."""
        async with qmp.monitor(directory) as monitor:
            await monitor.command("migrate_cancel")  # of a `save` whose process has died
            await monitor.command("cont")
        try:
            async with self._asking(directory, agentproto.clock(time.time_ns(), req=1), "its clock is late"):
                pass
        except (EngineError, UpstreamUnavailableError) as error:
            log.warning("%s", error)

    def usage(self, directory: Path) -> Usage:
        """See `hutch.engine.base.Engine.usage`. What the emulator takes, seen from the host."""
        entry = record.alive(directory)
        if entry is None:
            return Usage()
        measured = entry.group.usage()
        return Usage(memory_bytes=measured.memory_bytes, cpu_seconds=measured.cpu_seconds)

    def upper(self, directory: Path) -> Upper:
        """See `hutch.engine.base.Engine.upper`."""
        return disk.kind(directory)

    async def move_upper(self, directory: Path, target: Path) -> None:
        """See `hutch.engine.base.Engine.move_upper`. Raises `StorageError`."""
        disk.move(directory, target)

    async def copy_upper(self, directory: Path, target: Path) -> None:
        """See `hutch.engine.base.Engine.copy_upper`. Raises `StorageError`."""
        await disk.copy(directory, target)

    async def reset_upper(self, directory: Path) -> None:
        """See `hutch.engine.base.Engine.reset_upper`. Raises `StorageError`."""
        disk.reset(directory)

    async def upper_size(self, directory: Path) -> int:
        """See `hutch.engine.base.Engine.upper_size`."""
        return disk.size(directory)

    async def tree_size(self, path: Path) -> int:
        """See `hutch.engine.base.Engine.tree_size`."""
        return disk.size(path) or await trees.tree_size(path)

    async def remove_tree(self, path: Path) -> None:
        """See `hutch.engine.base.Engine.remove_tree`. Raises `StorageError`."""
        await trees.remove_tree(path)

    async def copy_tree(self, source: Path, target: Path) -> None:
        """See `hutch.engine.base.Engine.copy_tree`. Raises `StorageError`."""
        await trees.copy_tree(source, target)

    # Private methods.

    async def _end(self, directory: Path) -> None:
        entry = record.read(directory) or record.Record(group=Group.named(directory.name))
        entry.group.release()
        await self._end_process(directory)
        await entry.group.remove()
        record.clear(directory)

    async def _end_process(self, directory: Path) -> None:
        entry = record.read(directory)
        if entry is not None and entry.process is not None and not await entry.process.kill(KILL_SECONDS):
            raise EngineError(f"process {entry.process.pid} of the box in {directory} does not end")

    async def _runs(self, directory: Path) -> bool:
        """Whether the guest's processors run. Raises `UpstreamUnavailableError`, `EngineError`."""
        async with qmp.monitor(directory, seconds=SYNC_SECONDS) as monitor:
            return await monitor.running()

    async def _sync(self, directory: Path) -> None:
        """Let the guest write to its disk all that its programs have written. Raises `UpstreamUnavailableError`."""
        sync = agentproto.simple(agentproto.Request.SYNC, req=1)
        async with self._asking(directory, sync, "its disk may lack writes"):
            pass

    @contextlib.asynccontextmanager
    async def _asking(
        self, directory: Path, request: bytes, else_: str, seconds: float | None = None
    ) -> AsyncIterator[None]:
        """Have the guest's agent do something, and keep the connection during the block. Raises
        `UpstreamUnavailableError`, `EngineError` when it refuses."""
        with contextlib.ExitStack() as stack:
            answer = None
            patience = anyio.move_on_after(SYNC_SECONDS if seconds is None else seconds)
            with patience, contextlib.suppress(ConnectionError):  # a keeper that has enough of them closes it at once
                connection = stack.enter_context(await self.connect(directory))
                connection.send(request)
                answer = await _answer(connection)
            if answer is None:
                raise UpstreamUnavailableError(f"the guest of the box in {directory} does not answer; {else_}")
            if isinstance(answer, agentproto.Failed):
                raise EngineError(f"the guest of the box in {directory} refuses: {answer.message}; {else_}")
            yield


async def _answer(connection: socket.socket) -> agentproto.Answer | None:
    """Return the answer to request 1, ``None`` when the connection ends before."""
    decoder = frames.Decoder()
    while True:
        await anyio.wait_readable(connection)
        data = connection.recv(4096)
        if not data:
            return None
        for frame in decoder.receive(data):
            if frame.req == 1:
                return agentproto.decode_answer(frame)


def _refuse_kvm(cause: Exception) -> None:
    """The last word on KVM has a guest that boots."""
    log.warning("KVM is not used any more until the machine restarts: a guest did not boot under it (%s)", cause)
    kvm.refuse()


def _say(progress: Progress) -> None:
    log.info("kernel for VMs: %s %s", progress.phase, progress.item)
