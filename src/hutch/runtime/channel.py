"""The connection to one box's agent: a non-blocking socket around the sans-IO protocol.

Frames are dispatched in the event loop as they come; the socket is always drained, so a slow sink never delays a
reply or another execution (the agent's windows bound what can be on its way).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Protocol

import anyio

from hutch.core import agentproto as proto
from hutch.core.frames import Decoder, Frame, FrameError
from hutch.errors import (
    ExecError,
    HutchError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    ResourceExhaustedError,
    SessionReapedError,
    UnsupportedError,
    UpstreamUnavailableError,
)
from hutch.runtime.reader import READ_SIZE, AgentReader

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

log = logging.getLogger("hutch.channel")

_READS_PER_TURN = 4
_ANSWER_SECONDS = 30.0

_CAUSES = {
    proto.FailCode.COMMAND_NOT_FOUND: "command_not_found",
    proto.FailCode.NOT_EXECUTABLE: "not_executable",
    proto.FailCode.BAD_CWD: "bad_cwd",
    proto.FailCode.BAD_USER: "bad_user",
    proto.FailCode.START_FAILED: "start_failed",
}
_ERRORS: dict[int, type[HutchError]] = {
    proto.FailCode.INVALID: InvalidArgumentError,
    proto.FailCode.NOT_FOUND: NotFoundError,
    proto.FailCode.EXISTS: InvalidStateError,
    proto.FailCode.FINISHED: InvalidStateError,
    proto.FailCode.BUSY: InvalidStateError,
    proto.FailCode.REAPED: SessionReapedError,
    proto.FailCode.UNSUPPORTED: UnsupportedError,
    proto.FailCode.RESOURCE: ResourceExhaustedError,
}


class Watcher(Protocol):
    """What an execution looks like from its channel."""

    def on_event(self, event: proto.Event) -> None: ...

    def on_lost(self) -> None:
        """The connection is gone."""


class Channel:
    """A connection to an agent, whatever carries its bytes: requests and their answers, events and their watchers.

    A subclass sends (`send`), hands in what comes (`_received`) and ends what carries the bytes (`_disconnect`).
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder()
        self._requests: dict[int, asyncio.Future[proto.Answer]] = {}
        # What to do about an answer when its caller has gone away.
        self._abandoned: dict[int, Callable[[], None]] = {}
        # Far below 2^32, the width of the field, for any life of a connection.
        self._numbers = itertools.count(1)
        self._watchers: dict[str, Watcher] = {}
        self.hello = proto.Hello(0, 0, False, 0.0)
        self.closed = False

    async def greet(self) -> None:
        """Greet the agent; on any failure the connection is closed. Raises `UpstreamUnavailableError`."""
        try:
            answer = await self.request(proto.hello)
            if not isinstance(answer, proto.Hello) or answer.version != proto.VERSION:
                raise UpstreamUnavailableError(
                    "the box's agent speaks another version of the protocol; restart the box"
                )
            self.hello = answer
        except BaseException:
            self.close()
            raise

    def watch(self, exec_id: str, watcher: Watcher) -> None:
        """Deliver the events of an execution to ``watcher`` from now on."""
        self._watchers[exec_id] = watcher

    def unwatch(self, exec_id: str, watcher: Watcher) -> None:
        """Stop delivering, if this watcher is the one."""
        if self._watchers.get(exec_id) is watcher:
            del self._watchers[exec_id]

    async def request(
        self,
        build: Callable[[int], bytes],
        *,
        command: tuple[str, ...] = (),
        too_late: Callable[[], None] | None = None,
    ) -> proto.Answer:
        """Send a request and wait for its answer. A refusal is raised as the error that it means.

        ``too_late`` is called when the answer comes after the caller has gone away, to release what it stands for.
        """
        if self.closed:
            raise UpstreamUnavailableError("the connection to the box's agent is closed")
        number = next(self._numbers)
        data = build(number)
        future: asyncio.Future[proto.Answer] = self._loop.create_future()
        self._requests[number] = future
        if too_late is not None:
            self._abandoned[number] = too_late
        try:
            self.send(data)
            try:
                with anyio.fail_after(_ANSWER_SECONDS):
                    answer = await future
            except TimeoutError:
                raise UpstreamUnavailableError(
                    f"the box's agent did not answer within {_ANSWER_SECONDS:.0f} s; stop the box if it stays like that"
                ) from None
        except BaseException:
            if future.done() and not future.cancelled():
                self._release(number)  # the answer is there, but its caller was cancelled before it could take it
            raise
        finally:
            self._requests.pop(number, None)
        self._abandoned.pop(number, None)
        if isinstance(answer, proto.Failed):
            raise _error(answer, command)
        return answer

    def request_window(self, exec_id: str, stream: int, take: Callable[[int, int], None]) -> None:
        """Ask for a stream's window as shared memory.

        ``take`` is called with a descriptor that it owns and the size in bytes, before any event that relies on the
        window; it is not called when that cannot be: the bytes go on coming in frames then.
        """

    def send(self, data: bytes) -> None:
        """Queue bytes for the agent."""
        raise NotImplementedError

    def close(self, reason: HutchError | None = None) -> None:
        """End the connection; requests that wait fail (for ``reason``), watchers learn that it is lost."""
        if self.closed:
            return
        self.closed = True
        self._disconnect()
        for future in self._requests.values():
            if not future.done():
                future.set_exception(reason or UpstreamUnavailableError("the connection to the box's agent was lost"))
                future.exception()  # a caller that has gone away must not cause a warning
        watchers, self._watchers = list(self._watchers.values()), {}
        for watcher in watchers:
            watcher.on_lost()

    # For subclasses.

    def _disconnect(self) -> None:
        """End what carries the bytes."""
        raise NotImplementedError

    def _received(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the agent; a peer that breaks the protocol loses the connection."""
        try:
            for frame in self._decoder.receive(data):
                self._dispatch(frame)
        except FrameError as error:
            self._fail(error)

    def _fail(self, error: Exception | None) -> None:
        if error is not None and not isinstance(error, ConnectionError):
            log.warning("connection to an agent ended: %s", error)
        self.close()

    def _answer(self, frame: Frame, answer: proto.Answer) -> None:
        future = self._requests.get(frame.req)
        if future is not None and not future.done():
            future.set_result(answer)
        else:
            self._release(frame.req)

    # Private methods.

    def _release(self, number: int) -> None:
        too_late = self._abandoned.pop(number, None)
        if too_late is not None:
            too_late()

    def _dispatch(self, frame: Frame) -> None:
        answer = proto.decode_answer(frame)
        if answer is not None:
            self._answer(frame, answer)
            return
        watcher = self._watchers.get(frame.exec_id)
        if watcher is not None:
            watcher.on_event(proto.decode_event(frame))


class AgentChannel(Channel):
    """A connection to an agent by a socket. Made by `open`; `close` is idempotent."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._socket = sock
        self._reader = AgentReader(sock)
        # Bytes that the socket did not take yet.
        self._unsent = bytearray()
        self._loop.add_reader(sock, self._on_readable)

    @classmethod
    async def open(cls, sock: socket.socket) -> AgentChannel:
        """Take over a connected non-blocking socket and greet the agent. Raises `UpstreamUnavailableError`."""
        channel = cls(sock)
        await channel.greet()
        return channel

    def request_window(self, exec_id: str, stream: int, take: Callable[[int, int], None]) -> None:
        """See `Channel.request_window`."""
        number = next(self._numbers)
        self._reader.expect(number, take)
        self.send(proto.simple(proto.Request.SHM, req=number, exec_id=exec_id, stream=stream))

    def send(self, data: bytes) -> None:
        """Queue bytes for the agent."""
        if self.closed:
            return
        if self._unsent:
            self._unsent += data
            return
        try:
            sent = self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            return  # the agent has gone; what it said before is still there to be read, up to the end
        if sent < len(data):
            self._unsent += memoryview(data)[sent:]
            self._loop.add_writer(self._socket, self._on_writable)

    def drain(self) -> None:
        """The agent has gone: take what it said before, and close."""
        while not self.closed and self._readable():
            pass
        self.close()

    # Private methods: the socket.

    def _on_writable(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # as in `send`
            sent = len(self._unsent)
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        for _ in range(_READS_PER_TURN):
            if self.closed or not self._readable():
                return

    def _readable(self) -> bool:
        """Read once; whether there may be more."""
        try:
            data = self._reader.receive()
        except (BlockingIOError, InterruptedError):
            return False
        except (OSError, FrameError) as error:
            self._fail(error)
            return False
        if not data:
            self._fail(None)
            return False
        self._received(data)
        return len(data) == READ_SIZE

    def _disconnect(self) -> None:
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._reader.close()

    def _answer(self, frame: Frame, answer: proto.Answer) -> None:
        if not self._reader.answered(frame.req, answer):
            super()._answer(frame, answer)


def _error(answer: proto.Failed, command: tuple[str, ...]) -> HutchError:
    cause = _CAUSES.get(proto.FailCode(answer.code)) if answer.code in set(proto.FailCode) else None
    if cause is not None:
        return ExecError(answer.message or cause, command=command, cause=cause)
    kind = _ERRORS.get(answer.code, UpstreamUnavailableError)
    return kind(answer.message or f"the box's agent refused (code {answer.code})")
