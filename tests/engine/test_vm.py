"""What is particular to boxes that are VMs: confinement of the emulator, its faults, forks."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import anyio
import msgspec
import pytest

from hutch.engine import record
from hutch.engine.base import Lower, Observed
from hutch.engine.vm import VmEngine, disk, launch, qcow2
from hutch.errors import EngineError, StorageError, UpstreamUnavailableError
from hutch.types import Limits
from tests.engine.boxes import emulator, plan, running

pytestmark = pytest.mark.anyio

GUARD = "/guard.so"
"""In the emulator's root (agent/guard)."""


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


async def test_two_boxes_of_a_template_are_strangers(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    """Entropy, clock, names: what two copies of one machine would share."""
    seen = []
    for name in ("one", "two"):
        named = msgspec.structs.replace(plan(tmp_path / name, rootfs), hostname=name)
        async with running(vm, named) as box:
            output = await box.sh(
                "head -c 16 /dev/urandom | od -An -tx1; cat /etc/machine-id /proc/sys/kernel/random/boot_id;"
                "hostname; date +%s"
            )
            *values, clock = output.out.splitlines()
            assert abs(int(clock) - time.time()) < 5
            seen.append(values)
            await box.sh("echo secret > /dev/shm/secret; echo secret > /secret")
        async with running(vm, plan(tmp_path / f"{name}-next", rootfs)) as box:
            assert (await box.sh("ls -A /dev/shm; test ! -e /secret || echo leaked")).out == ""
    assert len(seen[0][1]) == 32 and not set(seen[0]) & set(seen[1])
    assert (seen[0][3], seen[1][3]) == ("one", "two")


async def test_a_machine_id_stays_with_its_box(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    box_plan = plan(tmp_path / "box", rootfs)
    seen = set()
    for _ in range(2):
        async with running(vm, box_plan) as box:
            seen.add((await box.sh("cat /etc/machine-id")).out)
    assert len(seen) == 1


async def test_cpus_memory_and_processes(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    limits = Limits(cpus=2, memory_mib=200, pids=40, disk_gb=1)
    async with running(vm, plan(tmp_path / "box", rootfs, limits=limits)) as box:
        assert box.started.unenforced == ()
        output = await box.sh("nproc; awk '/MemTotal/ {print $2}' /proc/meminfo; df -m / | awk 'NR == 2 {print $2}'")
        cpus, memory, size = map(int, output.out.split())
        assert cpus == 2
        assert 140 << 10 < memory <= 200 << 10
        assert 800 < size <= 1024
        output = await box.sh("for i in $(seq 80); do sleep 30 & done; echo started")
        assert "fork" in output.err


async def test_running_out_of_memory_stays_inside(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(vm, plan(tmp_path / "box", rootfs, limits=Limits(memory_mib=128))) as box:
        output = await box.sh("awk 'BEGIN { s = \"x\"; while (1) s = s s }'", timeout=40)
        assert output.status != 0
        assert (await box.sh("echo alive")).out == "alive\n"


async def test_the_emulator_is_confined(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(vm, plan(tmp_path / "box", rootfs)) as box:
        host = {name: str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("mnt", "net", "ipc", "uts", "pid")}
        for pid in (box.started.pid, emulator(box)):
            facts = status(pid)
            assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
            for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
                assert int(facts[name], 16) == 0, name
            if os.geteuid() == 0:
                assert set(facts["Uid"].split()) == set(facts["Gid"].split()) == {str(launch.USER)}
            for name, own in host.items():
                assert str(Path(f"/proc/{pid}/ns/{name}").readlink()) != own, name
        root = Path(f"/proc/{emulator(box)}/root")
        assert not (root / "root").exists() and not (root / "proc/self").exists() and not (root / "bin/sh").exists()
        assert not os.access(root / "etc/passwd", os.F_OK)


async def test_the_emulators_network_stack_is_guarded(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    """By a file of its own root that nobody can change; and the line is where the guard puts it."""
    async with running(vm, plan(tmp_path / "box", rootfs)) as box:
        proc = Path(f"/proc/{emulator(box)}")
        mapped = [line.split() for line in (proc / "maps").read_text().splitlines()]
        assert "r-xp" in {parts[1] for parts in mapped if parts[-1] == GUARD}
        assert (proc / "environ").read_bytes() == f"LD_PRELOAD={GUARD}\0".encode()
        assert str((proc / "fd/3").readlink()).startswith("socket:")
        assert stat.S_IMODE((proc / "root" / GUARD[1:]).stat().st_mode) == 0o444
        assert os.statvfs(proc / "root" / GUARD[1:]).f_flag & os.ST_RDONLY


async def test_the_emulator_can_write_nothing_that_others_use(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(vm, plan(tmp_path / "box", rootfs)) as box:
        writable = set()
        for entry in Path(f"/proc/{emulator(box)}/fd").iterdir():
            target = str(entry.readlink())
            flags = int(Path(f"/proc/{emulator(box)}/fdinfo/{entry.name}").read_text().split("flags:")[1].split()[0], 8)
            if target.startswith("/") and flags & os.O_ACCMODE != os.O_RDONLY:
                writable.add(target)
        assert writable <= {str(box.directory / disk.DISK), "/dev/null"}
        mapped = Path(f"/proc/{emulator(box)}/maps").read_text().splitlines()
        shared = [line for line in mapped if "/templates/" in line]
        assert shared and all(line.split()[1] == "rw-p" for line in shared)


async def test_a_killed_emulator_ends_the_box(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(vm, plan(tmp_path / "box", rootfs)) as box:
        entry = record.read(box.directory)
        assert entry is not None and entry.process is not None
        os.kill(emulator(box), signal.SIGKILL)
        with anyio.fail_after(10):
            while vm.observe(box.directory).running:
                await anyio.sleep(0.01)
            while entry.process.alive():  # on its way out, it still listens
                await anyio.sleep(0.01)
        assert "the emulator ended" in vm.last_words(box.directory)
        with pytest.raises(UpstreamUnavailableError):
            await vm.connect(box.directory)


async def test_a_frozen_emulator_is_ended_in_time(
    vm: VmEngine, rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hutch.engine.vm.engine.SYNC_SECONDS", 1.0)
    async with running(vm, plan(tmp_path / "box", rootfs)) as box:
        os.kill(emulator(box), signal.SIGSTOP)
        with anyio.fail_after(20):
            with pytest.raises(UpstreamUnavailableError):
                await vm.freeze(box.directory)
            await vm.kill(box.directory)
        assert vm.observe(box.directory) == Observed(running=False)


async def test_a_box_that_takes_no_more_connections_can_be_ended(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(vm, plan(tmp_path / "box", rootfs)) as box:
        with contextlib.ExitStack() as stack:
            for _ in range(64):
                stack.enter_context(await vm.connect(box.directory))
            with pytest.raises(UpstreamUnavailableError):
                await vm.freeze(box.directory)
            await vm.kill(box.directory)
        assert vm.observe(box.directory) == Observed(running=False)


async def test_freeze_and_thaw(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    """What was written before is on the disk; nothing runs meanwhile; a frozen box can be ended."""
    async with running(vm, plan(tmp_path / "box", rootfs)) as box:
        await box.spawn("while true; do :; done")
        await box.sh("echo frozen > /f")
        await vm.freeze(box.directory)
        await vm.freeze(box.directory)
        before = vm.usage(box.directory).cpu_seconds
        await vm.copy_upper(box.directory, tmp_path / "copy")
        await anyio.sleep(2)  # nothing happens, which gives no event
        after = vm.usage(box.directory).cpu_seconds
        assert before is None or after is None or after - before < 0.2
        await vm.thaw(box.directory)
        await vm.thaw(box.directory)
        assert (await box.sh("cat /f")).out == "frozen\n"
        assert abs(int((await box.sh("date +%s")).out) - time.time()) < 2
        await vm.freeze(box.directory)
    copy = Lower(tmp_path / "copy", owned_by_box=True)
    async with running(vm, plan(tmp_path / "second", rootfs, lowers=[copy])) as box:
        assert (await box.sh("cat /f")).out == "frozen\n"


async def test_what_runs_survives_in_a_fork(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(vm, plan(tmp_path / "box", rootfs)) as box:
        await box.spawn("until [ -e /gate ]; do sleep 0.05; done; echo passed > /passed")
        await vm.save(box.directory, tmp_path / "memory")
        await vm.copy_upper(box.directory, tmp_path / "copy")
        await vm.thaw(box.directory)
        assert (await box.sh("ls /passed")).status != 0
        twin = plan(tmp_path / "twin", rootfs, lowers=[Lower(tmp_path / "copy", owned_by_box=True)])
        async with running(vm, msgspec.structs.replace(twin, saved=tmp_path / "memory")) as fork:
            await vm.thaw(fork.directory)
            assert (await fork.sh("touch /gate; until [ -e /passed ]; do sleep 0.05; done")).status == 0
        assert (await box.sh("ls /passed")).status != 0


async def test_memory_meets_the_disk_that_it_was_saved_with(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    """Whatever a start before, which was not committed, has written."""
    async with running(vm, plan(tmp_path / "box", rootfs)) as box:
        await vm.save(box.directory, tmp_path / "memory")
        await vm.copy_upper(box.directory, tmp_path / "copy")
    twin = plan(tmp_path / "twin", rootfs, lowers=[Lower(tmp_path / "copy", owned_by_box=True)])
    twin = msgspec.structs.replace(twin, saved=tmp_path / "given")
    for _ in range(2):
        shutil.copy(tmp_path / "memory", tmp_path / "given")
        async with running(vm, twin) as fork:
            assert not (tmp_path / "given").exists()
            await vm.thaw(fork.directory)
            output = await fork.sh("""
                last=$(($(cat /sys/block/vda/size) - 1)); echo 3 > /proc/sys/vm/drop_caches
                dd if=/dev/vda skip=$last count=1 2>/dev/null | tr -d '\\0'
                echo written by another start | dd of=/dev/vda seek=$last conv=sync,fsync 2>/dev/null && echo done
            """)
            assert output.out == "done\n"


async def test_a_damaged_disk_is_named(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    box_plan = plan(tmp_path / "box", rootfs)
    async with running(vm, box_plan):
        pass
    path = tmp_path / "box" / disk.DISK
    whole = path.read_bytes()
    path.write_bytes(bytes(4096) + whole[4096:])
    with pytest.raises(StorageError, match="damaged"):
        await vm.start(box_plan)
    forged = bytearray(whole)
    forged[8:20] = (104).to_bytes(8, "big") + (11).to_bytes(4, "big")
    forged[104:115] = b"/etc/passwd"
    path.write_bytes(forged)
    with pytest.raises(StorageError, match="tampered"):
        await vm.start(box_plan)
    forged = bytearray(whole)
    forged[24:32] = (1 << 40).to_bytes(8, "big")  # larger than it may be
    path.write_bytes(forged)
    with pytest.raises(StorageError, match="tampered"):
        await vm.start(box_plan)
    path.unlink()
    qcow2.create(path, 10 << 30)
    (tmp_path / "box" / disk.BASE).unlink()
    with (tmp_path / "box" / disk.BASE).open("xb") as file:
        file.truncate(10 << 30)
    with pytest.raises(EngineError, match="mounting the disk"):
        await vm.start(box_plan)
    assert not vm.observe(box_plan.directory).running
    assert not any((box_plan.directory / "run").iterdir())


@pytest.mark.root
async def test_a_full_disk_of_the_host_is_an_error_in_the_box(vm: VmEngine, rootfs: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", small], check=True)
    try:
        async with running(vm, plan(small / "box", rootfs)) as box:
            output = await box.sh("dd if=/dev/urandom of=/big bs=1M count=60 conv=fsync 2>&1", timeout=50)
            assert output.status != 0 and "error" in output.out
            assert (await box.sh("echo alive")).out == "alive\n"
    finally:
        subprocess.run(["umount", small], check=True)
