"""What VMs are made from: templates and bases, which their makers share with others."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.engine import record
from hutch.engine.base import MountPlan
from hutch.engine.launcher import BoxFault
from hutch.engine.vm import VmEngine, disk, launch, qmp
from hutch.errors import EngineError, UpstreamUnavailableError
from hutch.host import kvm
from hutch.host.binary import agent_path
from hutch.host.proc import boot_id
from hutch.types import Limits
from tests.engine.boxes import emulator, plan, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hutch.engine.base import BoxPlan


pytestmark = pytest.mark.anyio


@pytest.fixture
def own_store(vm_store: Path, tmp_path: Path) -> Path:
    """A store with the kernel and nothing else."""
    store = tmp_path / "store"
    store.mkdir()
    (store / "kernels").symlink_to(vm_store / "kernels")
    return store


async def test_other_users_of_the_host_read_nothing(own_store: Path, rootfs: Path, tmp_path: Path) -> None:
    """Neither what a box has, nor what it is made from: its image too has files that are not for everybody."""
    before = os.umask(0)
    try:
        vm = VmEngine(own_store)
        async with running(vm, plan(tmp_path / "box", rootfs)) as box:
            await vm.save(box.directory, tmp_path / "box/memory")
            await vm.copy_upper(box.directory, tmp_path / "box/copy")
            below = (path for folder in ("bases", "templates") for path in (own_store / folder).rglob("*"))
            found = [path for path in (*below, *box.directory.rglob("*")) if path.is_file()]
            assert {"memory", "state", disk.BASE, disk.DISK, launch.CONSOLE, "main.log.0"} <= {
                path.name for path in found
            }
            assert [path for path in found if path.stat().st_mode & 0o077] == []
            assert (box.directory / "run").stat().st_mode & 0o077 == 0
    finally:
        os.umask(before)


async def test_a_template_can_be_deleted_at_any_time(own_store: Path, rootfs: Path, tmp_path: Path) -> None:
    vm = VmEngine(own_store)
    async with running(vm, plan(tmp_path / "one", rootfs)) as box:
        shutil.rmtree(own_store / "templates")
        assert (await box.sh("echo alive")).out == "alive\n"
    shape = await vm.shape(Limits())
    async with anyio.create_task_group() as tasks:  # two that want it at once make it once
        for name in ("two", "three"):
            tasks.start_soon(vm.start, plan(tmp_path / name, rootfs))
    assert [path.name for path in (own_store / "templates").glob("[!.]*")] == [shape.key]
    for name in ("two", "three"):
        await vm.kill(tmp_path / name)
        assert not (tmp_path / name / "run/state.json").exists()


PREPARER = """
import anyio, pathlib, sys
from hutch.engine.vm import VmEngine
anyio.run(VmEngine(pathlib.Path(sys.argv[1]), agent=pathlib.Path(sys.argv[2])).set_up, lambda step: None)
"""


def test_processes_make_one_template_of_each_key(own_store: Path, tmp_path: Path) -> None:
    """Two that want the same at the same time make it once; another agent is another key, and has its own."""
    agent, folder = tmp_path / "agent", own_store / "templates"
    shutil.copy(agent_path(), agent)
    argv = [sys.executable, "-c", PREPARER, str(own_store), str(agent)]
    both = [subprocess.Popen(argv) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    (first,) = folder.glob("[!.]*")
    made = first.stat().st_ino
    with agent.open("ab") as file:
        file.write(b"another")
    assert subprocess.run(argv, timeout=60).returncode == 0
    assert len(set(folder.glob("[!.]*"))) == 2 and first.stat().st_ino == made
    assert not list(folder.glob(".*.part"))


def test_what_a_killed_maker_leaves_is_cleared_away(own_store: Path, tmp_path: Path) -> None:
    """By whoever makes another template next: the same one may never be made again."""
    agent, folder = tmp_path / "agent", own_store / "templates"
    shutil.copy(agent_path(), agent)
    argv = [sys.executable, "-c", PREPARER, str(own_store), str(agent)]
    with subprocess.Popen(argv) as maker:
        deadline = time.monotonic() + 30
        while not list(folder.glob(".*.part/memory")) and time.monotonic() < deadline:
            time.sleep(0.01)
        maker.kill()
    (left,) = folder.glob(".*.part")
    with agent.open("ab") as file:
        file.write(b"another")
    assert subprocess.run(argv, timeout=60).returncode == 0
    assert not left.exists() and len(list(folder.glob("[!.]*"))) == 1


async def test_a_guest_that_does_not_boot_under_kvm_runs_without(
    vm_store: Path, rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No guest is as quick as this limit, whatever KVM is like here. From then on it is not tried any more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("hutch.engine.vm.template.KVM_BOOT_SECONDS", 0.05)
    (tmp_path / "hutch").mkdir()
    (tmp_path / "hutch/kvm").write_text(f"{boot_id()} {os.geteuid()} yes")
    kvm.usable.cache_clear()
    try:
        vm = VmEngine(vm_store)
        async with running(vm, plan(tmp_path / "box", rootfs)) as box:
            assert (await box.sh("echo translated")).out == "translated\n"
            assert "tcg" in Path(f"/proc/{emulator(box)}/cmdline").read_text()
        assert not await vm.uses_kvm()
        assert "KVM is not used any more until the machine restarts" in caplog.text
    finally:
        kvm.usable.cache_clear()


async def test_a_spoilt_template_is_thrown_away(own_store: Path, rootfs: Path, tmp_path: Path) -> None:
    """The box boots then, as it would without templates."""
    vm = VmEngine(own_store)
    async with running(vm, plan(tmp_path / "one", rootfs)):
        pass
    folder = own_store / "templates" / (await vm.shape(Limits())).key
    (folder / "state").write_bytes(b"no state")
    async with running(vm, plan(tmp_path / "two", rootfs)) as box:
        assert (await box.sh("echo booted")).out == "booted\n"
        assert not folder.exists()
        # What booted maps no template.
        assert "/templates/" not in Path(f"/proc/{emulator(box)}/maps").read_text()


async def test_a_fault_of_the_box_costs_no_template(
    vm: VmEngine, rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the launcher has ended before anybody asks for the monitor."""
    real = qmp.monitor

    @contextlib.asynccontextmanager
    async def late(directory: Path, **options: float) -> AsyncIterator[qmp.Monitor]:
        with anyio.fail_after(10), contextlib.suppress(UpstreamUnavailableError):
            while True:
                record.connect(directory, qmp.SOCKET).close()
                await anyio.sleep(0.01)
        async with real(directory, **options) as monitor:
            yield monitor

    async with running(vm, plan(tmp_path / "one", rootfs)):
        template = vm.templates._folder / (await vm.shape(Limits())).key
        before = template.stat().st_ino
    monkeypatch.setattr(qmp, "monitor", late)
    missing = MountPlan(source=tmp_path / "missing", target="/mnt")
    with pytest.raises(BoxFault, match="missing"):
        await vm.start(plan(tmp_path / "two", rootfs, mounts=[missing]))
    assert template.stat().st_ino == before


def spoil(box_plan: BoxPlan) -> None:
    """Make a disk one that the emulator refuses: what it has in its header is not checked by others."""
    with (box_plan.directory / disk.DISK).open("r+b") as file:
        file.seek(20)
        file.write(bytes(4))  # how large its clusters are


async def test_a_spoilt_disk_costs_no_template(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    """Other boxes start from it: whoever took over the emulator of one has nothing of theirs to spoil."""
    box_plan = plan(tmp_path / "box", rootfs)
    async with running(vm, box_plan):
        template = vm.templates._folder / (await vm.shape(Limits())).key
        before = template.stat().st_ino
    spoil(box_plan)
    with pytest.raises(EngineError, match="cluster size"):
        await vm.start(box_plan)
    assert template.stat().st_ino == before


async def test_a_spoilt_disk_says_nothing_about_kvm(
    vm: VmEngine, rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or one box could slow down all others, and make those that are to be isolated as well as possible containers."""
    box_plan = plan(tmp_path / "box", rootfs)
    async with running(vm, box_plan):
        pass
    spoil(box_plan)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "hutch").mkdir()
    (tmp_path / "hutch/kvm").write_text(f"{boot_id()} {os.geteuid()} yes")
    kvm.usable.cache_clear()
    try:
        vm.templates.enabled = False
        with pytest.raises(EngineError, match="cluster size"):
            await vm.start(box_plan)
        assert await vm.uses_kvm()
    finally:
        kvm.usable.cache_clear()
