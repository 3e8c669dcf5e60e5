"""Reading an agent's socket: bytes, and beside them the descriptors of shared windows that were asked for."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import threading
from typing import TYPE_CHECKING

from hutch.core import agentproto as proto
from hutch.core.frames import FrameError

if TYPE_CHECKING:
    from collections.abc import Callable

READ_SIZE = 512 * 1024

_thread = threading.local()


class AgentReader:
    """The reading side of a connected, non-blocking socket, which stays its maker's."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._view = _read_buffer()
        # Requests for shared memory under way, and the descriptors that came in for them.
        self._windows: dict[int, Callable[[int, int], None]] = {}
        self._fds: list[int] = []

    def expect(self, number: int, take: Callable[[int, int], None]) -> None:
        """A window is asked for by the request of this number: `answered` gives it to ``take``."""
        self._windows[number] = take

    def receive(self) -> memoryview:
        """Read once. What is returned, at most `READ_SIZE` bytes and none at the end, holds until the next read in this
        thread. Raises `OSError`, and `FrameError` for descriptors that nobody asked for."""
        if not self._windows:
            return self._view[: self._socket.recv_into(self._view)]
        fds = array.array("i")
        size, ancillary, _, _ = self._socket.recvmsg_into(
            [self._view], socket.CMSG_LEN(16 * fds.itemsize), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        self._fds += fds
        if len(self._fds) > len(self._windows):
            raise FrameError("the agent passed descriptors that nobody asked for")
        return self._view[:size]

    def answered(self, number: int, answer: proto.Answer) -> bool:
        """Whether this is the answer to a request for a window. Raises `FrameError`."""
        take = self._windows.pop(number, None)
        if take is None:
            return False
        if isinstance(answer, proto.Failed):
            return True
        if not isinstance(answer, proto.ShmOk) or not self._fds:
            raise FrameError("the agent promised shared memory but passed no descriptor")
        fd = self._fds.pop(0)
        try:
            _check_window(fd, answer.window)
        except FrameError:
            os.close(fd)
            raise
        take(fd, answer.window)
        return True

    def close(self) -> None:
        """Let go of what was passed and not taken."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def _read_buffer() -> memoryview:
    """The buffer that all readers of a thread's event loop read into: what is read is decoded, and so copied, at
    once."""
    view: memoryview | None = getattr(_thread, "buffer", None)
    if view is None:
        view = _thread.buffer = memoryview(bytearray(READ_SIZE))
    return view


def _check_window(fd: int, window: int) -> None:
    # A memory file that its sender could shrink would kill the reader with SIGBUS.
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    with contextlib.suppress(OSError):
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals == seals and os.fstat(fd).st_size == window:
            return
    raise FrameError("the agent passed a descriptor that is not a sealed window")
