"""Hutch: a sandbox for AI agents.

    async with hutch.Runtime.local() as runtime:
        box = await runtime.create("debian:12")
        result = await box.run("echo", "hello")

Names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hutch.core.sinks import Sink
    from hutch.errors import HutchError
    from hutch.runtime.command import Command
    from hutch.sdk import Runtime
    from hutch.types import BoxInfo, BoxSpec, BoxState, Isolation, Limits, Mount, Progress, Result

__version__ = "0.1.0"

_HOMES = {
    "BoxInfo": "hutch.types",
    "BoxSpec": "hutch.types",
    "BoxState": "hutch.types",
    "Command": "hutch.runtime.command",
    "HutchError": "hutch.errors",
    "Isolation": "hutch.types",
    "Limits": "hutch.types",
    "Mount": "hutch.types",
    "Progress": "hutch.types",
    "Result": "hutch.types",
    "Runtime": "hutch.sdk",
    "Sink": "hutch.core.sinks",
}

__all__ = [
    "BoxInfo",
    "BoxSpec",
    "BoxState",
    "Command",
    "HutchError",
    "Isolation",
    "Limits",
    "Mount",
    "Progress",
    "Result",
    "Runtime",
    "Sink",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hutch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
