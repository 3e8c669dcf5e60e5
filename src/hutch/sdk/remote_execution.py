"""An execution behind a server: the embedded one, on a connection that may be lost at any moment and is made again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from hutch.core import agentproto as proto
from hutch.errors import (
    HutchError,
    InvalidStateError,
    NotFoundError,
    PermissionDeniedError,
    RuntimeClosedError,
    SessionReapedError,
    StoppedError,
    UnauthenticatedError,
    UpstreamUnavailableError,
)
from hutch.runtime.execution import Host, LocalExecution
from hutch.sdk.remote_channel import Left, RemoteChannel
from hutch.sdk.remote_http import ConnectionFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hutch.sdk.remote_http import Http
    from hutch.types import ExecInfo

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
# What no later attempt will find otherwise.
_GONE = (NotFoundError, StoppedError, InvalidStateError)
_FINAL = (SessionReapedError, UnauthenticatedError, PermissionDeniedError)


class ConnectionLostError(UpstreamUnavailableError):
    """The connection was lost and could not be made again in time; the command may go on.

    ``exit_code`` is the exit code, if it was known; ``stdout`` and ``stderr`` are what had arrived in collecting
    sinks.
    """

    def __init__(self, message: str, *, exit_code: int | None, stdout: bytes, stderr: bytes) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr


class RemoteExecution(LocalExecution):
    """Implements `hutch.sdk.base.Execution`. ``forget``: at its end nobody needs its log any more."""

    probe: Callable[[], Awaitable[list[ExecInfo]]] | None = None
    forget = False

    async def kill(self) -> None:
        """Send SIGKILL to the process group."""
        self._check_running()
        await self._until_answered(lambda: self.signal(9))

    async def resize(self, rows: int, cols: int) -> None:
        """Set the terminal's size."""
        await self._until_answered(lambda: super(RemoteExecution, self).resize(rows, cols))

    async def begin(self, pid: int) -> None:
        """Watch what has somewhere to go, and the end, from the first connection on."""
        self.pid = pid
        try:
            await self.attach_first()
        except UpstreamUnavailableError:
            if not self._channel.closed:  # otherwise it is being connected again
                raise

    def leave_channel(self) -> RemoteChannel | None:
        """Leave the connection to others, if everything is over that this execution has to do with it."""
        channel = self._channel
        if self._result is None or self._machine.incomplete or not isinstance(channel, RemoteChannel):
            return None
        if not self.forget:
            self.send(proto.detach(self.id, sorted(self._watched)))
        self._channel = Left()
        return channel

    # What differs from the embedded one.

    async def _until_answered(self, ask: Callable[[], Awaitable[None]]) -> None:
        """Repeat what may be repeated when the answer was lost with the connection."""
        while True:
            channel = self._channel
            try:
                return await ask()
            except UpstreamUnavailableError:
                if channel is self._channel and not channel.closed:
                    raise
            while self._channel.closed and not self._done.is_set():  # noqa: ASYNC110  # it is replaced, or it ends
                await anyio.sleep(_FIRST_PAUSE)
            self._check_running()

    async def _check_agent(self) -> None:
        if self.probe is not None:
            try:
                await self.probe()
            except ConnectionFailed:  # the loss of a connection is dealt with elsewhere
                return

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, UpstreamUnavailableError):
            error = ConnectionLostError(
                str(error),
                exit_code=self._machine.exit.status if self._machine.exit else None,
                stdout=self._collected(proto.STDOUT),
                stderr=self._collected(proto.STDERR),
            )
        super()._fail(error)

    def _release(self) -> None:
        if self.forget and self._result is not None:
            self.send(proto.simple(proto.Request.FORGET, req=0, exec_id=self.id))
        super()._release()


async def connect(
    http: Http, box_id: str, exec_id: str, watcher: str, budget: float, oom_kills: int | None = None
) -> RemoteChannel | None:
    """Connect to an execution's relay: at once, then with growing pauses, for ``budget`` seconds. ``oom_kills``: how
    often memory had run out in the box before, if that is known.

    Returns ``None`` when there is nothing to connect to any more. Raises `UpstreamUnavailableError` at the end of the
    budget, and at once what no later attempt could change.
    """
    deadline = anyio.current_time() + budget
    pause = _FIRST_PAUSE
    while True:
        try:
            return await RemoteChannel.open(http, box_id, exec_id, watcher, oom_kills)
        except _GONE:
            return None
        except (*_FINAL, RuntimeClosedError):
            raise
        except HutchError as error:
            if anyio.current_time() + pause > deadline:
                raise UpstreamUnavailableError(
                    f"the connection to execution {exec_id} of box {box_id} was lost, and could not be made again "
                    f"within {budget:g} s ({error}); the command may go on: attach to it later"
                ) from error
        await anyio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


__all__ = ["ConnectionLostError", "Host", "RemoteExecution", "connect"]
