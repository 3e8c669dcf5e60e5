"""Boxes as hardened namespace containers. See docs/isolation.md."""

from hutch.engine.container.engine import ContainerEngine

__all__ = ["ContainerEngine"]
