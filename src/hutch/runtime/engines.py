"""The engines of one home: each box has its own, by its record."""

from __future__ import annotations

import functools
import shutil
from typing import TYPE_CHECKING

from hutch.types import Isolation

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.engine.base import Engine
    from hutch.engine.vm import VmEngine
    from hutch.runtime.home import Home
    from hutch.state import BoxRecord, Store
    from hutch.types import BoxSpec

PROGRAM = "qemu-system-x86_64"


class Engines:
    """See the module. ``given`` takes the place of the engine for containers."""

    def __init__(self, home: Home, store: Store, given: Engine | None = None) -> None:
        self._home = home
        self._store = store
        self._given = given

    @functools.cached_property
    def container(self) -> Engine:
        """The engine of containers; it also takes care of folders that are no box's alone."""
        if self._given is not None:
            return self._given
        from hutch.engine.container import ContainerEngine

        return ContainerEngine()

    @functools.cached_property
    def vm(self) -> VmEngine:
        """The engine of VMs."""
        from hutch.engine.vm import VmEngine

        return VmEngine(self._home.vm)

    def of(self, record: BoxRecord) -> Engine:
        """Return the engine of a box."""
        return self.vm if record.isolation == Isolation.VM else self.container

    def of_box(self, box_id: str) -> tuple[Engine, Path]:
        """Return the engine of a box, and its folder. One that has no record any more runs under neither."""
        record = self._store.get_box(box_id)
        return self.container if record is None else self.of(record), self._home.box(box_id)

    async def choose(self, spec: BoxSpec) -> str:
        """Decide what a box is isolated by. Raises `EngineError` for a VM on a machine that lacks what it takes."""
        if spec.isolation is Isolation.CONTAINER:
            return Isolation.CONTAINER
        if spec.isolation is Isolation.VM:
            self.vm.check()
            return Isolation.VM
        return Isolation.VM if await self.prefer_vm() else Isolation.CONTAINER

    async def prefer_vm(self) -> bool:
        """Whether boxes are VMs unless they ask for something else: where KVM really works, and a kernel is there."""
        possible = self._given is None and (self._home.vm / "kernels/current").exists() and shutil.which(PROGRAM)
        return bool(possible) and await self.vm.preferable()

    def vm_features(self) -> list[str]:
        """Return what VMs can beyond the minimum; nothing where there can be none."""
        return sorted(self.vm.capabilities) if shutil.which(PROGRAM) else []

    async def describe_vm(self) -> str:
        """Say what VMs are like here."""
        if shutil.which(PROGRAM) is None:
            return f"none: {PROGRAM} is not installed"
        speed = "at full speed, with KVM" if await self.vm.uses_kvm() else "slow, by translation (no usable KVM)"
        return speed if self.vm.kernels.current() else f"{speed}; `hutch setup vm` fetches the kernel"
