"""Boxes with a kernel of their own, beside a VM that boots, and beside QEMU alone."""

from __future__ import annotations

import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from bench.cases.streams import Counter
from bench.peers.base import pss, pss_of_made_code
from bench.rows import Goal, Quantity, Row, compare, single
from bench.samples import Outcome, alternate
from hutch.engine.vm import cpio, machine
from hutch.errors import EngineError
from hutch.types import Isolation

if TYPE_CHECKING:
    from bench.stage import Stage
    from hutch.engine.vm.kernel import Kernel

_BOXES = 4
_STREAM = 64 << 20
_BLOCK = 1 << 16
_BOOTED = "a VM that boots"
_PLAIN = "QEMU alone, boot a kernel, run `true`"
_SCRIPT = b"#!/bin/busybox sh\n/bin/busybox true\n/bin/busybox poweroff -f\n"


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of VMs: start, a command, output, memory."""
    engine = stage.runtime.engines.vm
    speed = await engine.set_up(lambda step: None)
    kernel = engine.kernels.current()
    if kernel is None:
        raise EngineError("no kernel was prepared")
    rows = await _starts(stage, kernel, speed)
    box = await stage.runtime.create(stage.image, isolation=Isolation.VM)
    await box.run("true")

    async def command() -> None:
        await box.run("true")

    async def output() -> float:
        sink = Counter()
        began = time.perf_counter()
        execution = await box.exec("dd", "if=/dev/zero", f"bs={_BLOCK}", f"count={_STREAM // _BLOCK}", stdout=sink)
        await execution.wait()
        return sink.total / (time.perf_counter() - began)

    outcomes = await alternate({"command": command}, {"command": stage.plan.rounds // 10}, budget=stage.plan.budget)
    goals: dict[str | None, Goal] = {None: Goal("at most 12 ms", "value", at_most=12)}
    rows += compare(Quantity("vm", f"run `true` in a VM ({speed})", "ms", 1e3), outcomes["command"], {}, goals)
    outcomes = await alternate({"output": output}, {"output": stage.plan.repeats}, budget=stage.plan.budget)
    goals = {None: Goal("at least 100 MB/s", "value", at_least=100)}
    what = Quantity("vm", f"output of a VM to a Python writer ({speed})", "MB/s", 1e-6, more_is_better=True)
    rows += compare(what, outcomes["output"], {}, goals)
    await box.remove(force=True)
    return rows + await _memory(stage)


async def _starts(stage: Stage, kernel: Kernel, speed: str) -> list[Row]:
    templates = stage.runtime.engines.vm.templates

    async def one(*, from_template: bool) -> float:
        templates.enabled = from_template
        began = time.perf_counter()
        box = await stage.runtime.create(stage.image, isolation=Isolation.VM)
        try:
            await box.run("true")
            return time.perf_counter() - began
        finally:
            templates.enabled = True
            await box.remove(force=True)

    async def restored() -> float:
        return await one(from_template=True)

    async def booted() -> float:
        return await one(from_template=False)

    with tempfile.TemporaryDirectory() as folder:
        argv = _plain(kernel, Path(folder), kvm=speed == "kvm")

        async def plain() -> float:
            began = time.perf_counter()
            await anyio.to_thread.run_sync(lambda: subprocess.run(argv, check=True, capture_output=True, timeout=60))
            return time.perf_counter() - began

        few = max(3, stage.plan.starts // 20)
        subjects = {"hutch": restored, _BOOTED: booted, _PLAIN: plain}
        outcomes = await alternate(
            subjects, {"hutch": few * 4, _BOOTED: few, _PLAIN: few}, budget=2 * stage.plan.budget
        )
    goals: dict[str | None, Goal] = {None: Goal("at most 500 ms", "value", at_most=500)}
    what = Quantity("vm", f"create a VM box, run `true` ({speed})", "ms", 1e3)
    return compare(what, outcomes.pop("hutch"), outcomes, goals)


def _plain(kernel: Kernel, folder: Path, *, kvm: bool) -> list[str]:
    """A VM that runs one program from its initial file system and ends."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise EngineError("busybox is not installed (apt-get install busybox-static)")
    entries = {
        "bin": (stat.S_IFDIR | 0o755, b""),
        "bin/busybox": (stat.S_IFREG | 0o755, Path(busybox).read_bytes()),
        "init": (stat.S_IFREG | 0o755, _SCRIPT),
    }
    (folder / "initrd").write_bytes(cpio.archive(entries))
    return [
        *(str(machine.program()), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35"),
        *(("-accel", "kvm", "-cpu", "host") if kvm else ("-accel", "tcg", "-cpu", "max")),
        *("-m", "512", "-kernel", str(kernel.image), "-initrd", str(folder / "initrd"), "-append", "quiet panic=-1"),
    ]


async def _memory(stage: Stage) -> list[Row]:
    """What one more idle VM costs: of memory that several share, each counts its part."""
    templates = stage.runtime.engines.vm.templates

    async def idle(*, from_template: bool) -> tuple[float, float]:
        """In all, and the part that is code which QEMU has translated."""
        boxes = []
        try:
            templates.enabled = from_template
            for _ in range(_BOXES):
                boxes.append(await stage.runtime.create(stage.image, isolation=Isolation.VM))
                await boxes[-1].run("true")
            total = translated = 0
            for box in boxes:
                keeper = (await box.info()).pid or 0
                children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
                for pid in (keeper, *map(int, children)):
                    total += pss(pid)
                    translated += pss_of_made_code(pid)
            return total / _BOXES, translated / _BOXES
        finally:
            templates.enabled = True
            for box in boxes:
                await box.remove(force=True)

    total, translated = await idle(from_template=True)
    booted, _ = await idle(from_template=False)
    rows = compare(
        Quantity("vm", "memory of an idle VM (PSS)", "MB", 1e-6), Outcome([total]), {_BOOTED: Outcome([booted])}
    )
    goal = Goal("at most 40 MB", "value", at_most=40)
    what = Quantity("vm", "memory of an idle VM, without the code that QEMU has translated (PSS)", "MB", 1e-6)
    return [*rows, single(what, total - translated, goal)]
