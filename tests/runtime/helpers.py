"""What the tests of the execution contract have in common."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import anyio

from hutch.runtime.runtime import LocalRuntime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.types import BoxSpec

PATIENCE = 15.0
"""Seconds after which a wait that should end has failed."""


class RuntimeOf(LocalRuntime):
    """A runtime whose boxes are of one kind."""

    isolation = "container"

    async def create(self, image: str | BoxSpec, **options: Any) -> LocalBox:
        """See `LocalRuntime.create`."""
        return await super().create(image, **{"isolation": self.isolation, **options})


def in_time(seconds: float = PATIENCE) -> contextlib.AbstractContextManager[anyio.CancelScope]:
    """Bound a block: a wait that hangs is a failure, not a stuck test."""
    return anyio.fail_after(seconds)


def sh(script: str) -> tuple[str, ...]:
    """A shell command."""
    return ("sh", "-c", script)


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = PATIENCE) -> None:
    """Poll for what has no event of its own, such as a process that ends in a box."""
    with in_time(seconds):
        while not (value if isinstance(value := condition(), bool) else await value):
            await anyio.sleep(0.01)


async def next_line(chunks: AsyncIterator[bytes]) -> bytes:
    """Return what comes up to the end of a line, in however many chunks."""
    line = await anext(chunks)
    while not line.endswith(b"\n"):
        line += await anext(chunks)
    return line


class Sink:
    """An async sink that keeps what it gets, and takes nothing while it is shut."""

    def __init__(self, *, shut: bool = False) -> None:
        self.data = bytearray()
        self.chunks: list[bytes] = []
        self.called = anyio.Event()
        self._open = anyio.Event()
        if not shut:
            self._open.set()

    def open(self) -> None:
        """Take everything from now on."""
        self._open.set()

    async def write(self, data: bytes) -> None:
        self.called.set()
        await self._open.wait()
        self.data += data
        self.chunks.append(bytes(data))


class BlockingSink:
    """A sink with an ordinary blocking ``write``, which takes nothing while it is shut (five seconds at most)."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.open = threading.Event()
        self.called = threading.Event()

    def write(self, data: bytes) -> None:
        self.called.set()
        self.open.wait(5)
        self.data += data


async def processes(box: LocalBox, marker: str) -> list[str]:
    """The processes of a box whose command line contains the marker."""
    listing = await box.run(
        *sh("for f in /proc/[0-9]*; do echo ${f##*/} $(tr '\\0' ' ' < $f/cmdline); done 2>/dev/null")
    )
    return [line for line in listing.text.splitlines() if marker in line and "cmdline" not in line]


@contextlib.contextmanager
def opened_gate(path: Path) -> Iterator[None]:
    """A file exists once the block is left: commands in a box with the folder mounted wait for it."""
    try:
        yield
    finally:
        path.touch()
