"""The embedded product: boxes, executions, files, snapshots, on one home directory, without a daemon."""

from hutch.runtime.box import LocalBox
from hutch.runtime.command import Command
from hutch.runtime.execution import LocalExecution
from hutch.runtime.runtime import LocalRuntime

__all__ = ["Command", "LocalBox", "LocalExecution", "LocalRuntime"]
