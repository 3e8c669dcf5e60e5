"""One command in one box: the shell around `hutch.core.execstream`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import anyio

from hutch.core import agentproto as proto
from hutch.core.execstream import Ack, Chunk, Ended, ExecStream, Finished, Lost, Phase
from hutch.core.execstream import Output as Effect
from hutch.core.frames import FrameError
from hutch.errors import (
    DeadlineError,
    HutchError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    RuntimeClosedError,
    UpstreamUnavailableError,
)
from hutch.runtime.checks import check_seconds, check_size, check_whole
from hutch.runtime.outputs import Collector, Consumer, Discard, OutputStream, Pump
from hutch.runtime.stdin import ExecStdin
from hutch.runtime.windows import Windows
from hutch.types import Result

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hutch.core.sinks import Sink
    from hutch.runtime.channel import Channel
    from hutch.runtime.outputs import Output

COLLECT_LIMIT = 64 << 20
# What the agent takes from the starter of an execution before it grants more.
_STARTER_CREDIT = 64 * 1024
# Seconds without the end of a command after which its agent is asked whether it is there.
_SILENCE = 5.0

# How long a lost connection may take to turn out as the end of the box, or to be made again.
_RESUME_SECONDS = 5.0

DISCARD = object()
"""As a sink: throw the stream away."""


class Host:
    """What an execution needs from the box that it runs in."""

    def __init__(
        self,
        *,
        box: str,
        reconnect: Callable[[], Awaitable[Channel | None]],
        spawn: Callable[..., None],
        oom_kills: Callable[[], int | None],
        paused: Callable[[], bool],
        forget: Callable[[LocalExecution], None],
        own_channel: bool,
    ) -> None:
        # The box's id, for messages.
        self.box = box
        # Returns a new channel, or None when the box does not run any more.
        self.reconnect = reconnect
        # Runs a coroutine function in the runtime's task group.
        self.spawn = spawn
        self.oom_kills = oom_kills
        self.paused = paused
        # Called once, when the execution has finished or was closed.
        self.forget = forget
        # Whether the channels are this execution's alone, which then closes them.
        self.own_channel = own_channel


class LocalExecution:
    """A running or finished command. Implements `hutch.sdk.base.Execution`."""

    def __init__(
        self,
        host: Host,
        channel: Channel,
        exec_id: str,
        *,
        tty: bool = False,
        stdin: bool = False,
        collect_limit: int = COLLECT_LIMIT,
        on_exit: Callable[[Result], Any] | None = None,
        starting: bool = False,
    ) -> None:
        """``starting``: `started` will be called."""
        self.id = exec_id
        self.pid = 0
        self.tty = tty
        self._host = host
        self._channel = channel
        streams = (proto.STDOUT,) if tty else proto.STREAMS
        self._machine = ExecStream(window=channel.hello.window, streams=streams)
        self._streams = streams
        self._collect_limit = collect_limit
        self._outputs: dict[int, Output] = {}
        # Streams that the agent was asked to send.
        self._watched: set[int] = set()
        self._windows = Windows(channel, exec_id)
        self._reaped = anyio.Event()
        self._done = anyio.Event()
        self._error: BaseException | None = None
        self._result: Result | None = None
        self._closed = False
        self._starting = starting
        self._on_exit = on_exit
        self._oom_before = host.oom_kills()
        self._oom_killed = False
        self._started = anyio.current_time()
        self._duration = 0.0
        self.stdin = ExecStdin(self, opened=stdin)
        self.stdout = OutputStream(lambda: self._iterate(proto.STDOUT), lambda: self._machine.dropped(proto.STDOUT))
        self.stderr = OutputStream(lambda: self._iterate(proto.STDERR), lambda: self._machine.dropped(proto.STDERR))
        channel.watch(exec_id, self)

    # What the caller sees.

    @property
    def exit_code(self) -> int | None:
        """The exit code, once the terminal event was seen."""
        return self._result.exit_code if self._result else None

    @property
    def finished(self) -> bool:
        """Whether the terminal event was seen."""
        return self._done.is_set()

    async def wait(self, timeout: float | None = None) -> Result:
        """Wait for the end and for every byte to be delivered. See `hutch.sdk.base.Execution.wait`."""
        check_seconds("timeout", timeout)
        self.check_open()
        if not self._done.is_set():
            self._claim_rest()
            try:
                with anyio.fail_after(timeout):
                    await self._reaped.wait()
            except TimeoutError:
                if not self._reaped.is_set():
                    raise DeadlineError(f"the command still runs after {timeout:g} s; it was left running") from None
            # Once it is reaped a deadline no longer cuts the drain.
            await self._done.wait()
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise InvalidStateError("the execution was closed")
        return self._result

    async def wait_with_agent(self) -> Result:
        """`wait`, for a caller who alone could end the command: raises `UpstreamUnavailableError` when the agent,
        which enforces the command's own timeout, does not answer any more."""
        while True:
            try:
                return await self.wait(_SILENCE)
            except DeadlineError:
                if self.finished:  # the error of a sink
                    raise
                await self._check_agent()

    async def signal(self, signum: int) -> None:
        """Send a signal to the process group."""
        self._check_running()
        check_whole("signal", signum, 1, 64)
        await self._request(lambda req: proto.signal(self.id, signum, req=req))

    async def kill(self) -> None:
        """Send SIGKILL to the process group."""
        await self.signal(9)

    async def resize(self, rows: int, cols: int) -> None:
        """Set the terminal's size."""
        if not self.tty:
            raise InvalidArgumentError("the command has no terminal; start it with tty=True to resize it")
        check_size(rows, cols)
        self._check_running()
        await self._request(lambda req: proto.resize(self.id, rows, cols, req=req))

    async def close(self) -> None:
        """Let go of the execution; the command goes on. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if not self._done.is_set() and self._watched and not self._channel.closed:
            self.send(proto.detach(self.id, sorted(self._watched)))
        self._release()
        self._reaped.set()
        self._done.set()

    def feed(self, data: bytes) -> None:
        """Write the data to the standard input and close it, in the background."""
        self._host.spawn(self._feed_stdin, data)

    # What the box and the runtime use.

    def set_sink(self, stream: int, sink: Sink | object) -> None:
        """Decide where a stream goes, before its first byte is asked for."""
        if stream not in self._streams:
            return

        delivered = self._deliverer(stream)
        if sink is DISCARD:
            self._outputs[stream] = Discard(delivered)
        else:
            # One sink for both streams is given one chunk at a time.
            locks = [o.lock for o in self._outputs.values() if isinstance(o, Pump) and o.sink is sink]
            lock = locks[0] if locks else anyio.Lock(fast_acquire=True)
            self._outputs[stream] = Pump(delivered, sink, self._host.spawn, lock)  # type: ignore[arg-type]  # it is a Sink

    def set_collectors(self) -> None:
        """Collect all streams that have no sink."""
        for stream in self._streams:
            if stream not in self._outputs:
                self._outputs[stream] = Collector(self._deliverer(stream), self._collect_limit)

    def watches_all(self) -> bool:
        """Whether every stream has somewhere to go."""
        return all(stream in self._outputs for stream in self._streams)

    def started(self, pid: int, *, watched: bool) -> None:
        """The agent has started it; ``watched``: it sends all streams already."""
        self.pid = pid
        self._starting = False
        if watched:
            self._watched |= set(self._streams)
            self.stdin.begin(_STARTER_CREDIT, 0)
        elif self._outputs or self.stdin.opened:
            self._watched |= set(self._outputs)
            self._host.spawn(self._attach_or_fail, set(self._outputs))
        if self._channel.closed:
            self.on_lost()

    def move(self, channel: Channel) -> None:
        """Go on with another connection."""
        self._channel = channel
        self._windows.close()
        self._windows = Windows(channel, self.id)
        channel.watch(self.id, self)

    def rewind(self, positions: dict[int, int]) -> None:
        """Watch from these positions on instead of from the start."""
        for stream, position in positions.items():
            if stream in self._streams and position:
                self._machine.rewind(stream, position)

    async def attach_first(self) -> None:
        """Attach to an execution that someone else started. Raises `NotFoundError` or `SessionReapedError`."""
        wanted = set(self._outputs) - self._watched
        self._watched |= wanted
        answer = await self._channel.request(lambda req: proto.attach(self.id, self._machine.attach(wanted), req=req))
        if isinstance(answer, proto.Attached):
            self.stdin.begin(answer.stdin_credit, answer.stdin_accepted)

    def send(self, data: bytes) -> None:
        """Send a frame to the agent."""
        self._channel.send(data)

    def close_channel(self) -> None:
        """Close the connection, which is this execution's alone."""
        self._channel.close(self._error if isinstance(self._error, HutchError) else None)

    @property
    def input_closed(self) -> bool:
        """Whether what is written to the standard input is thrown away."""
        return self.stdin.released

    async def kill_quietly(self) -> None:
        """Kill the command, if it still runs."""
        with contextlib.suppress(HutchError):
            await self.kill()

    def check_open(self) -> None:
        """Raise `InvalidStateError` if the execution was closed, `RuntimeClosedError` if its runtime was."""
        if isinstance(self._error, RuntimeClosedError):
            raise self._error
        if self._closed:
            raise InvalidStateError("the execution was closed")

    def on_event(self, event: proto.Event) -> None:
        """Take an event from the channel."""
        if isinstance(event, proto.StdinCredit):
            self.stdin.grant(event.size)
        elif isinstance(event, proto.StdinClosed):
            self.stdin.release()
        else:
            self._apply(self._machine.receive(event))

    def on_lost(self) -> None:
        """The connection is gone: connect again and go on where it was, or learn that the box is gone."""
        if not self._done.is_set() and not self._starting:  # who starts it asks again
            self._host.spawn(self._resume)

    def runtime_closed(self) -> None:
        """The runtime is being closed: end every wait, with what there is."""
        if self._done.is_set():
            return
        code = self._machine.exit.status if self._machine.exit else None
        self._error = self._error or RuntimeClosedError(
            "the runtime was closed while the command ran"
            if code is None
            else "the runtime was closed during the drain",
            exit_code=code,
            stdout=self._collected(proto.STDOUT),
            stderr=self._collected(proto.STDERR),
        )
        self._release()
        self._reaped.set()
        self._done.set()

    # Private methods: streams.

    async def _feed_stdin(self, data: bytes) -> None:
        with contextlib.suppress(InvalidStateError):  # closed meanwhile: nobody wants the rest
            await self.stdin.write(data)
            await self.stdin.close()

    def _deliverer(self, stream: int) -> Callable[[int], None]:
        return lambda position: self._apply(self._machine.delivered(stream, position))

    async def _iterate(self, stream: int) -> Consumer:
        self.check_open()
        if stream not in self._streams:  # a terminal has one merged stream
            consumer = Consumer(lambda position: None, self._why_closed)
            consumer.end()
            return consumer
        if stream in self._outputs:
            raise InvalidStateError("this output already has a reader or a sink")
        consumer = Consumer(self._deliverer(stream), self._why_closed)
        self._outputs[stream] = consumer
        self._attach({stream})
        return consumer

    def _why_closed(self) -> BaseException:
        return self._error or InvalidStateError("the execution was closed while its output was read")

    def _claim_rest(self) -> None:
        before = set(self._outputs)
        self.set_collectors()
        self._attach(set(self._outputs) - before)

    def _attach(self, streams: set[int]) -> None:
        wanted = streams - self._watched
        if not wanted:
            return
        self._watched |= wanted
        self._host.spawn(self._attach_or_fail, wanted)

    async def _attach_or_fail(self, streams: set[int]) -> None:
        try:
            answer = await self._channel.request(
                lambda req: proto.attach(self.id, self._machine.attach(streams), req=req)
            )
        except HutchError as error:
            if not self._channel.closed:  # otherwise the loss of the channel is dealt with
                self._fail(error)
            return
        if isinstance(answer, proto.Attached):
            self.stdin.begin(answer.stdin_credit, answer.stdin_accepted)

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Chunk):
                self._hand_over(effect)
            elif isinstance(effect, Ack):
                self.send(proto.ack(self.id, effect.stream, effect.position))
            elif isinstance(effect, Ended):
                if (output := self._outputs.get(effect.stream)) is not None:
                    output.end()
            elif isinstance(effect, Finished):
                self._finish(effect.exit)
            elif isinstance(effect, Lost):
                pass  # counted by the machine; the stream's `dropped` tells
        if self._machine.phase is not Phase.RUNNING and not self._reaped.is_set():
            self._reap()

    def _hand_over(self, chunk: Chunk) -> None:
        output = self._outputs.get(chunk.stream)
        if output is None:
            raise FrameError("the agent sent output that nobody asked for")
        if chunk.data is None:
            for end, view in self._windows.pieces(chunk.stream, chunk.position, chunk.length):
                output.feed(end, view)
            return
        output.feed(chunk.position + chunk.length, chunk.data)
        if isinstance(output, Pump):
            self._windows.count(chunk.stream, chunk.length)

    # Private methods: the end.

    def _reap(self) -> None:
        self._duration = anyio.current_time() - self._started
        self.stdin.release()
        if self._oom_before is not None:
            now = self._host.oom_kills()
            self._oom_killed = now is not None and now > self._oom_before
        self._reaped.set()
        if self._on_exit is not None:
            # Nobody may be waiting: what was not claimed by now must not hold up the callback.
            self._claim_rest()

    def _finish(self, exit: proto.Exited) -> None:
        if not self._reaped.is_set():
            self._reap()
        collectors = [o for o in self._outputs.values() if isinstance(o, Collector)]
        overflow = sum(c.overflow for c in collectors)
        dropped = sum(self._machine.dropped(s) for s in self._streams)
        self._result = Result(
            exit_code=exit.status,
            stdout=self._collected(proto.STDOUT),
            stderr=self._collected(proto.STDERR),
            timed_out=exit.timed_out,
            truncated=bool(overflow) or self._machine.incomplete,
            dropped=dropped + overflow,
            lingering=self._machine.lingering,
            oom_killed=self._oom_killed or exit.oom_killed,
            duration=self._duration,
            user_seconds=exit.user,
            system_seconds=exit.system,
            max_rss=exit.max_rss,
        )
        for output in self._outputs.values():
            if isinstance(output, Pump) and output.error is not None and self._error is None:
                self._error = output.error
                with contextlib.suppress(AttributeError, TypeError):
                    output.error.exit_code = exit.status  # type: ignore[attr-defined]  # the contract: it carries the exit code
        self._release()
        if self._on_exit is not None:
            try:
                self._on_exit(self._result)
            except Exception as error:
                self._error = self._error or error
        self._done.set()

    def _fail(self, error: BaseException) -> None:
        if self._done.is_set():
            return
        self._error = error
        self._release()
        self._reaped.set()
        self._done.set()

    def _release(self) -> None:
        self._channel.unwatch(self.id, self)
        self.stdin.release()
        if self._result is None:
            for output in self._outputs.values():
                output.close()
        self._windows.close()
        self._host.forget(self)

    def _collected(self, stream: int) -> bytes:
        output = self._outputs.get(stream)
        return output.getvalue() if isinstance(output, Collector) else b""

    async def _request(self, build: Callable[[int], bytes]) -> None:
        """Ask the agent for something that only a running command can do."""
        channel = self._channel
        try:
            await channel.request(build)
        except UpstreamUnavailableError:
            if not channel.closed:
                raise
            # With the end of its main command the whole box goes, and the answer may be lost with it.
            with anyio.move_on_after(_RESUME_SECONDS):
                await self._reaped.wait()
            self._check_running()
            raise

    async def _check_agent(self) -> None:
        channel = self._channel
        try:
            await channel.request(lambda req: proto.simple(proto.Request.PING, req=req))
        except UpstreamUnavailableError:
            # The loss of a connection is dealt with elsewhere, and who is frozen cannot answer.
            if channel is self._channel and not channel.closed and not self._host.paused():
                raise

    def _check_running(self) -> None:
        self.check_open()
        if self._machine.phase is not Phase.RUNNING:
            raise InvalidStateError("the command has ended")

    async def _resume(self) -> None:
        if self._done.is_set():
            return
        try:
            channel = await self._host.reconnect()
        except HutchError as error:
            self._fail(error)
            return
        if self._done.is_set():
            if channel is not None and self._host.own_channel:
                channel.close()
            return
        if channel is not None:
            self.move(channel)
            self.stdin.restart()
            try:
                await self._attach_again(channel)
            except NotFoundError:
                channel.unwatch(self.id, self)  # the box was started anew: this run of it is over
            except HutchError as error:
                if not channel.closed:
                    self._fail(error)
                return
            else:
                return
        self._apply(self._machine.abandon(proto.Exited(-9, False, 0.0, 0.0, 0.0, 0)))
        if not self._done.is_set() and not self._watched:
            self._claim_nothing()

    async def _attach_again(self, channel: Channel) -> None:
        positions = self._machine.attach(self._watched)
        answer = await channel.request(lambda req: proto.attach(self.id, positions, req=req))
        if isinstance(answer, proto.Attached):
            self.stdin.begin(answer.stdin_credit, answer.stdin_accepted)

    def _claim_nothing(self) -> None:
        # Nobody watches a stream, so nobody will deliver what was never received.
        for stream in self._streams:
            self._outputs.setdefault(stream, Discard(self._deliverer(stream)))
