"""Control groups: the real ones of this machine, and the files of both versions."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Literal

import anyio
import pytest

from hutch.errors import EngineError
from hutch.host import cgroup
from hutch.types import Limits


def _sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"])


LIMITS = Limits(cpus=2, memory_mib=64, pids=10)


def _folder(tmp_path: Path, version: Literal[1, 2], files: dict[str, str]) -> cgroup.Group:
    """A group whose files are ordinary ones: what is written can be read, what is absent fails as in the kernel's."""
    path = tmp_path / "group"
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return cgroup.Group((cgroup.Parent(str(path), version, frozenset(cgroup.CONTROLLERS)),))


def test_version_2_files(tmp_path: Path) -> None:
    files = {
        "cpu.max": "",
        "memory.max": "",
        "memory.swap.max": "",
        "pids.max": "",
        "memory.current": "5000000\n",
        "memory.stat": "anon 1\ninactive_file 1000000\n",
        "memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 0\n",
        "cpu.stat": "usage_usec 2500000\nuser_usec 1\n",
        "pids.current": "7\n",
    }
    group = _folder(tmp_path, 2, files)
    path = Path(group.members[0].path)
    assert group.create(LIMITS) == ()
    assert (path / "cpu.max").read_text() == "200000 100000"
    assert (path / "pids.max").read_text() == "10"
    assert (path / "memory.swap.max").read_text() == "0"
    assert group.doors() == (str(path / "cgroup.procs"),)
    assert group.usage() == cgroup.Measured(
        memory_bytes=4_000_000, memory_limit_bytes=64 << 20, cpu_seconds=2.5, pids=7, oom_kills=2
    )


def test_version_1_files(tmp_path: Path) -> None:
    files = {
        "cpu.cfs_period_us": "",
        "cpu.cfs_quota_us": "",
        "memory.limit_in_bytes": "",
        "memory.swappiness": "",
        "pids.max": "",
        "devices.deny": "",
        "devices.allow": "",
        "memory.usage_in_bytes": "5000000\n",
        "memory.stat": "total_inactive_file 1000000\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
        "cpuacct.usage": "1500000000\n",
        "pids.current": "3\n",
    }
    group = _folder(tmp_path, 1, files)
    path = Path(group.members[0].path)
    assert group.create(LIMITS) == ()
    assert (path / "cpu.cfs_quota_us").read_text() == "200000"
    assert (path / "devices.deny").read_text() == "a"
    assert (path / "memory.swappiness").read_text().startswith("0"), "no memsw here: the box must not swap"
    assert group.doors() == (str(path / "tasks"),)
    assert group.usage() == cgroup.Measured(
        memory_bytes=4_000_000, memory_limit_bytes=64 << 20, cpu_seconds=1.5, pids=3, oom_kills=4
    )


def test_what_cannot_be_set_is_named(tmp_path: Path) -> None:
    assert _folder(tmp_path, 2, {"pids.max": ""}).create(LIMITS) == ("cpus", "memory")
    assert cgroup.Group(()).create(LIMITS) == ("cpus", "memory", "pids")
    assert cgroup.Group(()).create(Limits(pids=None)) == ()
    assert cgroup.Group(()).usage() == cgroup.Measured()


def test_no_freezer() -> None:
    assert not cgroup.Group(()).can_freeze()
    with pytest.raises(EngineError):
        anyio.run(cgroup.Group(()).freeze, True)


@pytest.mark.root
def test_a_real_group_kills_and_goes() -> None:
    """A group with processes in it, frozen ones too, is emptied and removed."""
    group = cgroup.Group.named(f"test-host-{os.getpid()}")
    if not group.members:
        pytest.skip("no control group can be made here")

    async def main() -> None:
        try:
            assert group.create(Limits(pids=5)) == ()
            with _sleeper() as child:
                for door in group.doors():
                    Path(door).with_name("cgroup.procs").write_text(str(child.pid))
                assert group.usage().pids == 1
                if group.can_freeze():
                    await group.freeze(True)
                await group.remove()
                assert child.wait() == -9
        finally:
            await group.remove()
        assert not any(Path(member.path).exists() for member in group.members)

    anyio.run(main)


@pytest.mark.root
def test_version_2_freezes_and_goes(tmp_path: Path) -> None:
    """The parts of version 2 that need no controller, on the real file system where it is mounted."""
    mounts = [mount for mount, kind, _ in cgroup._mounts() if kind == "cgroup2"]
    if not mounts or not os.access(mounts[0], os.W_OK):
        pytest.skip("no version 2 hierarchy here")
    path = mounts[0] / f"hutch-test-{os.getpid()}"
    group = cgroup.Group((cgroup.Parent(str(path), 2, frozenset({"freezer"})),))

    async def main() -> None:
        try:
            assert group.create(Limits(pids=None)) == ()
            with _sleeper() as child:
                Path(group.doors()[0]).write_text(str(child.pid))
                await group.freeze(True)
                await group.freeze(False)
                await group.freeze(True)
                await group.remove()
                assert child.wait() == -9
        finally:
            await group.remove()
        assert not path.exists()

    anyio.run(main)
