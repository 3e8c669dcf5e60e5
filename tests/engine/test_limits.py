"""Limits of boxes that root starts, by control groups; and their absence, which is told."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.host import cgroup
from hutch.types import Limits
from tests.engine.boxes import plan, running

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.engine.container import ContainerEngine

pytestmark = [pytest.mark.anyio, pytest.mark.root]

CONTROLLED = frozenset().union(*(parent.controllers for parent in cgroup.parents()))


def needs(controller: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(controller not in CONTROLLED, reason=f"no {controller} control group here")


@needs("memory")
async def test_memory(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    limits = Limits(memory_mib=48)
    async with running(container, plan(tmp_path / "box", rootfs, limits=limits)) as box:
        assert box.started.unenforced == ()
        before = container.usage(box.directory)
        assert before.memory_limit_bytes == 48 << 20
        assert before.oom_kills == 0
        output = await box.sh("awk 'BEGIN { s = \"x\"; while (1) s = s s }'")
        assert output.status != 0
        after = container.usage(box.directory)
        assert after.oom_kills is not None and after.oom_kills >= 1
        assert (await box.sh("echo alive")).out == "alive\n"


@needs("memory")
async def test_shared_memory_counts(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(container, plan(tmp_path / "box", rootfs, limits=Limits(memory_mib=32))) as box:
        await box.sh("dd if=/dev/zero of=/dev/shm/x bs=1M count=60")
        usage = container.usage(box.directory)
        assert usage.memory_bytes is not None and usage.memory_bytes <= 32 << 20
        assert usage.oom_kills is not None and usage.oom_kills >= 1


@needs("pids")
async def test_processes(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(container, plan(tmp_path / "box", rootfs, limits=Limits(pids=20))) as box:
        output = await box.sh("for i in $(seq 60); do sleep 30 & done; echo $(ls -d /proc/[0-9]* | wc -l)")
        assert "fork" in output.err
        pids = container.usage(box.directory).pids
        assert pids is not None and 10 <= pids <= 20


@needs("cpu")
async def test_cpus(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    """Four busy loops for half a second get no more than one processor's time."""
    async with running(container, plan(tmp_path / "box", rootfs, limits=Limits(cpus=1))) as box:
        before = container.usage(box.directory).cpu_seconds
        start = time.monotonic()
        await box.spawn("for i in 1 2 3 4; do while :; do :; done & done; wait")
        await anyio.sleep(0.5)
        used = container.usage(box.directory).cpu_seconds
        elapsed = time.monotonic() - start
        assert before is not None and used is not None
        assert 0 < used - before <= elapsed + 0.15


async def test_default_limits(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(container, plan(tmp_path / "box", rootfs)) as box:
        assert container.usage(box.directory).memory_limit_bytes is None
        assert (await box.sh("ulimit -c; ulimit -n")).out.split()[0] == "0"


async def test_unenforced_limits_are_named(
    container: ContainerEngine, rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without control groups still runs boxes, and says what it does not enforce."""
    monkeypatch.setattr(cgroup, "parents", lambda: ())
    limits = Limits(cpus=1, memory_mib=64, pids=100)
    async with running(container, plan(tmp_path / "box", rootfs, limits=limits)) as box:
        assert box.started.unenforced == ("cpus", "memory", "pids")
        assert (await box.sh("echo ok")).out == "ok\n"
        assert container.usage(box.directory).memory_bytes is None
