"""The caller's terminal (raw mode, size, detach keys), and the standard streams as sinks and sources."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import select
import signal
import stat
import termios
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

STDIN, STDOUT, STDERR = 0, 1, 2
CTRL_P, CTRL_Q = b"\x10", b"\x11"
_CHUNK = 65536


class DetachKeys:
    """Finds Ctrl-P Ctrl-Q in what is typed. A Ctrl-P is held back until the next key tells what it was."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Return the bytes to pass on, and whether the keys were pressed (what follows them is dropped)."""
        data = self._held + data
        before, keys, _ = data.partition(CTRL_P + CTRL_Q)
        if keys:
            self._held = b""
            return before, True
        self._held = CTRL_P if data.endswith(CTRL_P) else b""
        return data.removesuffix(CTRL_P), False


class OutputFile(io.FileIO):
    """A standard stream as a sink. ``gone`` is called (in the event loop) when its reader has gone away."""

    def __init__(self, fd: int, gone: Callable[[], object]) -> None:
        super().__init__(fd, "wb", closefd=False)
        self._gone = gone
        self._loop = asyncio.get_running_loop()

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]  # what the runtime hands over
        """Write some of the bytes; waits also where someone made the descriptor non-blocking."""
        try:
            while (written := super().write(data)) is None:
                select.select([], [self.fileno()], [])
        except OSError:
            self._loop.call_soon_threadsafe(self._gone)
            raise
        return written


@contextmanager
def raw(fd: int) -> Iterator[None]:
    """Put a terminal into raw mode for the time of the block. It is restored however the block ends."""
    saved = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal itself may be gone
            termios.tcsetattr(fd, termios.TCSADRAIN, saved)


@contextmanager
def hidden(fd: int, prompt: str) -> Iterator[None]:
    """Show a prompt, and not what is typed, for the time of the block. Nothing happens when it is no terminal."""
    if not os.isatty(fd):
        yield
        return
    saved = termios.tcgetattr(fd)
    silent = [*saved[:3], saved[3] & ~termios.ECHO, *saved[4:]]
    try:
        termios.tcsetattr(fd, termios.TCSAFLUSH, silent)  # before the prompt: what is typed after it must not be lost
        os.write(STDERR, prompt.encode())
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSADRAIN, saved)
        os.write(STDERR, b"\n")


def size(fd: int) -> tuple[int, int]:
    """Rows and columns of a terminal; 24×80 for one that does not know."""
    with contextlib.suppress(OSError):
        columns, rows = os.get_terminal_size(fd)
        if rows and columns:
            return rows, columns
    return 24, 80


async def follow_size(fd: int, resize: Callable[[int, int], Awaitable[None]]) -> None:
    """Pass the size on now and whenever the window changes."""
    with anyio.open_signal_receiver(signal.SIGWINCH) as changes:
        await resize(*size(fd))
        async for _ in changes:
            await resize(*size(fd))


async def read(fd: int) -> AsyncIterator[bytes]:
    """The bytes of a descriptor up to end of file. Waiting can be cancelled; what comes later stays there."""
    waits = not stat.S_ISREG(os.fstat(fd).st_mode)
    while True:
        if waits:
            try:
                await anyio.wait_readable(fd)
            except PermissionError:  # epoll does not know it, so reading it does not wait (/dev/null)
                waits = False
        try:
            data = os.read(fd, _CHUNK) if waits else await anyio.to_thread.run_sync(os.read, fd, _CHUNK)
        except BlockingIOError:
            continue
        except OSError:  # EIO: the terminal has hung up
            return
        if not data:
            return
        yield data


async def read_secret(prompt: str, limit: int = 64 << 10) -> str:
    """A line of standard input, which a terminal does not show."""
    line = b""
    with hidden(STDIN, prompt):
        async for piece in read(STDIN):
            line += piece
            if b"\n" in line or len(line) > limit:
                break
    return line.partition(b"\n")[0].decode("utf-8", "replace").strip()


async def write(fd: int, data: bytes) -> None:
    """Write all bytes to a descriptor without holding up anything else."""
    await anyio.to_thread.run_sync(_write_all, fd, data, abandon_on_cancel=True)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])
