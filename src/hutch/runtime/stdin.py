"""The standard input of an execution: in order, with back-pressure by credit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from hutch.core import agentproto as proto
from hutch.core.credits import Credit
from hutch.errors import InvalidStateError
from hutch.runtime.checks import check_bytes

if TYPE_CHECKING:
    from hutch.runtime.execution import LocalExecution

_CHUNK = 64 * 1024


class ExecStdin:
    """The standard input of an execution. Implements `hutch.sdk.base.Stdin`."""

    def __init__(self, execution: LocalExecution, *, opened: bool) -> None:
        self._execution = execution
        self._credit = Credit()
        self._more = anyio.Event()
        self._order = anyio.Lock()
        self._opened = opened
        self._closed = not opened
        self._begun = False
        # Bytes that were sent and may not have arrived: the credit for them has not come back.
        self._unconfirmed = bytearray()
        self._sent = 0
        # What the agent had accepted, from others, before our first byte.
        self._origin: int | None = None

    async def write(self, data: bytes) -> None:
        """Send bytes, all and in order, waiting while the command does not read. Raises `InvalidStateError` after
        `close`."""
        self._execution.check_open()
        if not self._opened:
            raise InvalidStateError("the command was started without a standard input; pass stdin=True")
        check_bytes("what is written to a standard input", data)
        view = memoryview(data).cast("B")
        async with self._order:
            if self._closed:
                raise InvalidStateError("the standard input was closed")
            while view and not self._credit.closed:
                size = self._credit.draw(min(len(view), _CHUNK))
                if not size:
                    self._more = anyio.Event()
                    await self._more.wait()
                    self._execution.check_open()
                    continue
                self._send(bytes(view[:size]))
                view = view[size:]

    async def close(self) -> None:
        """Send end of file. Idempotent."""
        async with self._order:
            if self._closed:
                return
            self._closed = True
            self._execution.send(proto.stdin_eof(self._execution.id))

    @property
    def opened(self) -> bool:
        """Whether the command was started with one."""
        return self._opened

    def begin(self, size: int, accepted: int) -> None:
        """The credit that this connection starts with, and how many bytes of input the agent has accepted so far.

        Both are told at each attach and count once. After a broken connection what was lost with it is sent again.
        """
        if self._begun:
            return
        self._begun = True
        if self._origin is None:
            self._origin = accepted
        lost = self._sent - (accepted - self._origin)
        if 0 < lost <= len(self._unconfirmed):
            size -= lost
            self._execution.send(proto.stdin(self._execution.id, bytes(self._unconfirmed[-lost:])))
        if self._opened and self._closed:
            self._execution.send(proto.stdin_eof(self._execution.id))
        self._credit.grant(max(size, 0))
        self._more.set()

    def restart(self) -> None:
        """The connection is a new one: its credit is yet to be told."""
        self._begun = False
        self._credit.draw(self._credit.size)

    def grant(self, size: int) -> None:
        """The command took so many bytes, so the agent takes as many more."""
        del self._unconfirmed[:size]
        self._credit.grant(size)
        self._more.set()

    @property
    def released(self) -> bool:
        """Whether the command does not read any more."""
        return self._credit.closed

    def release(self) -> None:
        """The command does not read any more: whoever waits goes on, what comes is thrown away."""
        self._credit.close()
        self._more.set()

    def _send(self, data: bytes) -> None:
        self._unconfirmed += data
        self._sent += len(data)
        self._execution.send(proto.stdin(self._execution.id, data))
