"""Boxes as micro-VMs under QEMU. See docs/vm.md."""

from hutch.engine.vm.engine import VmEngine

__all__ = ["VmEngine"]
