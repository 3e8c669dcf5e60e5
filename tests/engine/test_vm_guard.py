"""Emulators whose network stack cannot be guarded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hutch.engine.vm import VmEngine
from hutch.errors import EngineError
from hutch.host.binary import agent_path
from tests.engine.boxes import plan

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("whole", "broken", "told"),
    [(b"\x7fELF", b"\x7fELM", "'3' is not a socket"), (b"slirp_input\0", b"slirp_inpux\0", "cannot be guarded")],
    ids=["unloadable", "of another stack"],
)
async def test_without_a_guard_no_emulator_runs(
    vm_store: Path, rootfs: Path, tmp_path: Path, whole: bytes, broken: bytes, told: str
) -> None:
    """With an agent that carries a bad one."""
    before, _, after = agent_path().read_bytes().rpartition(whole)
    agent = tmp_path / "box-agent"
    agent.write_bytes(before + broken + after)
    agent.chmod(0o755)
    vm = VmEngine(vm_store, agent=agent)
    box_plan = plan(tmp_path / "box", rootfs)
    with pytest.raises(EngineError, match=told):
        await vm.start(box_plan)
    assert not vm.observe(box_plan.directory).running
