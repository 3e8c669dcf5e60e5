"""The small interface behind which boxes are isolated.

An engine starts a box so that an agent (PID 1) runs in it, gives byte channels to that agent, and takes the box away
again. Executing commands, files and metrics of commands are not the engine's: they speak the agent protocol over the
channel.

The runtime serialises calls that change one box (it holds the box's lock); ``observe``, ``connect`` and ``stats``
may come at any time, from any process. Nothing here reads the record database.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from hutch.types import Limits

if TYPE_CHECKING:
    import socket


class Capability(enum.StrEnum):
    """What an engine can do beyond the minimum."""

    PAUSE = "pause"
    FORK = "fork"
    """The memory of a running box can be saved, and another box go on from there."""
    SHARED_MEMORY = "shared_memory"
    """The channel passes descriptors, so output can be read from shared memory."""


NO_FORK = "containers cannot be forked while they run; use isolation 'vm', or clone the box: that copies its disk"


class Upper(enum.Enum):
    """What holds what a box has written. ``EMPTY``: it has written nothing. ``MOVABLE``: it can become a frozen layer
    by `Engine.move_upper`. ``FIXED``: it can only be copied."""

    EMPTY = enum.auto()
    MOVABLE = enum.auto()
    FIXED = enum.auto()


class Lower(msgspec.Struct, frozen=True):
    """One read-only layer of a box's root. ``owned_by_box``: its owners on disk are those of the box's user
    namespace already (a frozen upper layer); otherwise they are the image's own (0 … 65535) and are shifted at the
    mount."""

    path: Path
    owned_by_box: bool = False


class MountPlan(msgspec.Struct, frozen=True):
    """A host path bound into the box. The target is resolved inside the box's root and made when absent."""

    source: Path
    target: str
    read_only: bool = False


class BoxPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine needs to start a box.

    ``directory`` is the box's own folder on the host. It exists, and belongs to the engine, which keeps the writable
    layer in it; ``main.log.0``, ``main.log.1`` and ``exit`` are the agent's (see docs/agent-protocol.md).
    """

    box_id: str
    directory: Path
    lowers: tuple[Lower, ...]
    """Topmost first."""
    hostname: str
    limits: Limits = Limits()
    mounts: tuple[MountPlan, ...] = ()
    nameserver: str = ""
    """Which the box asks for names; empty: none. Nobody answers there until the box has a network."""
    saved: Path | None = None
    """A file that `Engine.save` has written, and that is gone once the box is started. The box goes on from there,
    processes and all, on the disk that the other had then, instead of starting afresh. Its processes stand still until
    `Engine.thaw`."""


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a box that was started."""

    pid: int
    """PID 1 of the box, as the host sees it."""
    unenforced: tuple[str, ...] = ()
    """The limits asked for that this machine cannot enforce, e.g. ``("memory", "disk")``."""


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """The truth about a box. ``running``: its PID 1 is alive (checked by pid and start time). ``pid`` is ``None``
    when it is not."""

    running: bool
    pid: int | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What the box uses, from the host's view; ``None`` where it cannot be measured."""

    memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    cpu_seconds: float | None = None
    pids: int | None = None
    oom_kills: int | None = None


class Engine(Protocol):
    """See the module. ``directory`` is always the box's folder (``BoxPlan.directory``)."""

    name: str
    capabilities: frozenset[Capability]

    def check(self) -> None:
        """Raise `EngineError` (with the way out) when this machine cannot run boxes of this kind."""

    async def start(self, plan: BoxPlan) -> Started:
        """Start the box and return once its agent answers on the channel. On any failure or cancellation nothing is
        left behind.

        Raises `EngineError` naming the step that failed.
        """

    async def connect(self, directory: Path) -> socket.socket:
        """Return a connected, non-blocking stream socket to the agent.

        Raises `UpstreamUnavailableError` when no agent listens.
        """

    def observe(self, directory: Path) -> Observed:
        """Look whether the box runs. Cheap (well under a millisecond), never blocks, never raises for a missing
        box."""

    def last_words(self, directory: Path) -> str:
        """Return what is known of why a box ended that nobody has stopped; empty when nothing is."""

    def network(self, directory: Path) -> int | None:
        """Return a new pidfd of a process in the network namespace in which the packets of the box end, ``None`` when
        the box does not run. The process lives as long as the box; the host's root, or the user whose box it is, may
        enter the namespace and change it, and nobody in the box may."""

    async def link(self, directory: Path) -> None:
        """Make a running box one whose packets end in that namespace, where they do not by themselves: before, it
        sends none. Idempotent.

        Raises `NetworkError`.
        """

    async def kill(self, directory: Path) -> None:
        """End every process of the box at once and release all that the start took (mounts, cgroups, run files).
        Idempotent; returns when nothing is left. The upper layer and the logs stay."""

    async def freeze(self, directory: Path) -> None:
        """Stop all processes of the box from running until `thaw`."""

    async def thaw(self, directory: Path) -> None:
        """Undo `freeze`. Idempotent."""

    async def save(self, directory: Path, target: Path) -> None:
        """Freeze a running box and write its memory to a file that does not exist yet, for `BoxPlan.saved`. Undo it by
        `thaw`, also after a failure. Raises `UnsupportedError` without `Capability.FORK`, `EngineError`,
        `StorageError`."""

    def usage(self, directory: Path) -> Usage:
        """Measure. Cheap; all fields ``None`` for a box that does not run."""

    def upper(self, directory: Path) -> Upper:
        """Say what the writable layer of the box is. Cheap."""

    async def move_upper(self, directory: Path, target: Path) -> None:
        """Make the writable layer of a box that does not run, and whose layer is `Upper.MOVABLE`, a folder that
        `Lower` can name. The box has an empty one afterwards."""

    async def copy_upper(self, directory: Path, target: Path) -> None:
        """Copy the writable layer of a box that does not run or is frozen, and whose layer is not `Upper.EMPTY`, to a
        folder that `Lower` can name. As `copy_tree` otherwise."""

    async def reset_upper(self, directory: Path) -> None:
        """Empty the writable layer of a box that does not run. Idempotent: it can be finished after an
        interruption."""

    async def upper_size(self, directory: Path) -> int:
        """Measure what the writable layer takes on the host's disk, in bytes."""

    async def tree_size(self, path: Path) -> int:
        """Measure what a frozen layer, or any other folder, takes on the host's disk, in bytes; 0 when it is absent.
        What it shares with others counts for none of them."""

    async def remove_tree(self, path: Path) -> None:
        """Delete a folder whose files may belong to the box's users. Idempotent. Never follows a symlink out of
        it."""

    async def copy_tree(self, source: Path, target: Path) -> None:
        """Copy a layer: owners, modes, times, xattrs, hard links, devices, sparse files. ``target`` must not exist;
        on failure none of it stays."""
