"""One client of one execution, on a WebSocket without a sub-protocol (docs/server.md, "Attach").

Output goes to the client in frames that end between characters, and counts as consumed only when the client's Pong
says that it has arrived: until then the box keeps it. What a client had not got when its connection broke is kept for
it for a while; a client that comes back gets all that the box has kept, and then the rest.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from hutch.core.utf8 import Cutter
from hutch.errors import HutchError, InvalidStateError, UpstreamUnavailableError
from hutch.server.registry import MAIN, End
from hutch.server.wire import RECEIPTS, Receipts
from hutch.types import BoxState, ExecState, Result

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Message, Receive, Scope, Send

    from hutch.sdk.base import Box, Execution
    from hutch.server.registry import Entry
    from hutch.server.service import Service

EXECUTION_ID = "x-boxlite-execution-id"
STDOUT, STDERR = 1, 2
SIGNALS = frozenset({1, 2, 3, 6, 10, 12, 15, 28})
"""What may be sent; SIGKILL goes by DELETE of the execution."""

_FRAME = 256 * 1024
_STDIN_WAITING = 16 << 20
_CONTROLS_WAITING = 64
# How much of the log of a main command that has ended is shown, by stream.
_BACKLOG = 256 * 1024
_POLL_SECONDS = 1.0
_NORMAL, _VIOLATION, _INTERNAL = 1000, 1008, 1011


class Control(msgspec.Struct):
    """A text frame of the client."""

    type: str
    rows: int = 0
    cols: int = 0
    sig: int = 0


class Attachment:
    """See the module."""

    def __init__(self, service: Service, box: Box, entry: Entry, *, read_only: bool, scope: Scope, send: Send) -> None:
        self.execution: Execution | None = None
        # Everything that the execution wrote has arrived.
        self.delivered = False
        # Set when another client of the execution has taken the place of this one.
        self.superseded = anyio.Event()
        self._service = service
        self._box = box
        self._entry = entry
        self._read_only = read_only
        self._send = send
        self._receipts: Receipts | None = scope.get("extensions", {}).get(RECEIPTS)
        self._cutters = {STDOUT: Cutter(_FRAME), STDERR: Cutter(_FRAME)}
        self._opened = anyio.Event()
        self._let_go = anyio.Event()
        self._slot: anyio.Semaphore | None = None
        self._stdin = _StdinQueue()
        self._controls_in, self._controls = anyio.create_memory_object_stream[Control](_CONTROLS_WAITING)
        self._scope = anyio.CancelScope()
        self._main_started = anyio.Event()
        self._over = False
        self._code = 0

    async def run(self, receive: Receive) -> None:
        """Serve the client until the execution has ended or the connection has."""
        headers = [(EXECUTION_ID.encode(), self._entry.id.encode())]
        try:
            with self._scope:
                await self._send({"type": "websocket.accept", "headers": headers})
                # The client counts the seconds up to the first frame.
                await self._send({"type": "websocket.send", "bytes": b""})
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._receive, receive)
                    tasks.start_soon(self._obey)
                    if not self._read_only:
                        tasks.start_soon(self._feed_stdin)
                    await self._serve()
                    tasks.cancel_scope.cancel()
        except* OSError:  # the connection broke while something was sent
            pass
        finally:
            self._over = True
            self._controls_in.close()
            self._controls.close()
            orderly = self._code in (1000, 1001)
            self._service.executions.release(self._entry, self, cut=not (self.delivered or orderly))

    async def alive(self, seconds: float) -> bool:
        """Whether the client answers."""
        return self._receipts is None or await self._receipts.alive(seconds)

    def abort(self) -> None:
        """Drop the connection."""
        self._scope.cancel()

    async def let_go(self) -> None:
        """Release the execution, and with it what it still holds for this client."""
        with anyio.CancelScope(shield=True):
            if self.execution is not None:
                await self.execution.close()
            self._let_go.set()
            if self._slot is not None:
                self._slot.release()
                self._slot = None

    async def start_main(self) -> None:
        """Start the box, whose main command this client waits for, so that it misses nothing."""
        try:
            self.execution = await self._box.start_attached(
                stdout=functools.partial(self._sink, STDOUT), stderr=functools.partial(self._sink, STDERR)
            )
        except InvalidStateError:  # somebody else was faster
            await self._box.start()
        self._main_started.set()
        if self._over:
            await self.let_go()

    # Output.

    async def _serve(self) -> None:
        try:
            result = await self._result()
        except HutchError as error:
            await self._tell("error", message=error.message)
            await self._give_up(error)
            return
        tails = [(stream, tail) for stream, cutter in self._cutters.items() if (tail := cutter.flush())]
        for stream, tail in tails:
            await self._put(stream, tail)
        if tails and not await self._arrived():
            return
        self._finish(result)
        more: dict[str, Any] = {"timed_out": True} if result.timed_out else {}
        if result.dropped:
            more["dropped"] = result.dropped
        await self._tell("exit", exit_code=result.exit_code, **more)
        await self._close(_NORMAL)

    async def _give_up(self, error: HutchError) -> None:
        """The output cannot be had. When the end is known (the box was stopped meanwhile), that is told at least; but
        not while the box runs and only the way to it is broken: then the output is there for a client that comes
        back, which nobody does who was told the end."""
        end = None
        with contextlib.suppress(HutchError):
            way_broken = isinstance(error, UpstreamUnavailableError)
            if not (way_broken and (await self._box.info()).state in (BoxState.RUNNING, BoxState.PAUSED)):
                end = (await self._service.executions.find(self._box, self._entry.id)).end
        if end is None:
            await self._close(_INTERNAL)
            return
        self.delivered = True
        await self._tell("exit", exit_code=end.exit_code)
        await self._close(_NORMAL)

    async def _result(self) -> Result:
        """Wait for the end; by then everything has been sent."""
        if self._entry.id == MAIN and not await self._main_runs():
            return await self._replay_main()
        if self.execution is None:
            self._slot = await self._service.executions.watch_slot(self._box.id)
            try:
                async with self._service.executions.asking(self._box):
                    self.execution = await self._box.attach(
                        self._entry.id,
                        stdout=functools.partial(self._sink, STDOUT),
                        stderr=functools.partial(self._sink, STDERR),
                    )
            except HutchError:
                # With the end of its main command the whole box has gone, but not the log.
                if self._entry.id == MAIN and not await self._main_runs():
                    return await self._replay_main()
                raise
        self._service.executions.take_over(self._entry)
        self._opened.set()
        return await self.execution.wait()

    async def _sink(self, stream: int, data: bytes) -> None:
        try:
            for piece in self._cutters[stream].feed(data):
                await self._put(stream, piece)
            if await self._arrived():
                return
        except OSError:
            pass
        # Not delivered: as long as this call lasts the box keeps it.
        await self._let_go.wait()

    async def _put(self, stream: int, piece: bytes) -> None:
        await self._send({"type": "websocket.send", "bytes": bytes((stream,)) + piece})

    async def _arrived(self) -> bool:
        return self._receipts is None or await self._receipts.confirm()

    async def _tell(self, kind: str, **values: object) -> None:
        await self._send({"type": "websocket.send", "text": msgspec.json.encode({"type": kind, **values}).decode()})

    async def _close(self, code: int) -> None:
        await self._send({"type": "websocket.close", "code": code})

    def _finish(self, result: Result) -> None:
        self.delivered = True
        if self._entry.end is None:
            state = ExecState.KILLED if result.exit_code < 0 else ExecState.COMPLETED
            state = ExecState.TIMED_OUT if result.timed_out else state
            self._entry.end = End(state, result.exit_code, time.time())

    # A main command.

    async def _main_runs(self) -> bool:
        """Wait for the first start of the box; false when its main command has ended already."""
        self._service.early[self._box.id] = self
        try:
            while self.execution is None:
                info = await self._box.info()
                if info.state not in (BoxState.CONFIGURED, BoxState.STOPPED, BoxState.FAILED):
                    return True
                if info.started_at is not None:
                    return False
                with anyio.move_on_after(_POLL_SECONDS):  # others may start it without telling us
                    await self._main_started.wait()
            return True
        finally:
            if self._service.early.get(self._box.id) is self:
                del self._service.early[self._box.id]

    async def _replay_main(self) -> Result:
        kept: dict[str, deque[bytes]] = {"stdout": deque(), "stderr": deque()}
        size = dict.fromkeys(kept, 0)
        async for record in self._box.logs():
            lines = kept[record.stream]
            lines.append(record.data)
            size[record.stream] += len(record.data)
            while size[record.stream] - len(lines[0]) >= _BACKLOG:
                size[record.stream] -= len(lines.popleft())
        for name, stream in (("stdout", STDOUT), ("stderr", STDERR)):
            for piece in self._cutters[stream].feed(b"".join(kept[name])[-_BACKLOG:]):
                await self._put(stream, piece)
        await self._arrived()
        info = await self._box.info()
        return Result(exit_code=-9 if info.exit_code is None else info.exit_code)

    # Input.

    async def _receive(self, receive: Receive) -> None:
        """Take what the client sends, always: also its Pongs wait behind it."""
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                self._code = message.get("code", 0)
                self._scope.cancel()
                return
            if message["type"] == "websocket.receive":
                await self._take(message)

    async def _take(self, message: Message) -> None:
        data, text = message.get("bytes"), message.get("text")
        self._service.touch(self._box.id)
        if data is not None:
            if self._read_only:
                await self._tell("error", message="this client only reads (stdin=0); its input is refused")
                await self._close(_VIOLATION)
                self._scope.cancel()
            elif data:
                await self._enqueue(data)
            return
        try:
            control = msgspec.json.decode(text or "", type=Control)
            if control.type == "stdin_eof":
                if not self._read_only:
                    await self._enqueue(None)
            elif control.type in ("resize", "signal"):
                self._controls_in.send_nowait(control)
            else:
                await self._tell("error", message=f"unknown type {control.type!r:.100}")
        except msgspec.DecodeError as error:
            await self._tell("error", message=f"not understood: {error}"[:500])
        except anyio.WouldBlock:
            await self._tell("error", message="too many requests wait already; this one was dropped")

    async def _enqueue(self, data: bytes | None) -> None:
        if self._stdin.put(data):
            return
        # The command is slower than its client: let the connection fill up. No Pong comes through meanwhile.
        if self._receipts is not None:
            self._receipts.waive(True)
        try:
            await self._stdin.room()
        finally:
            if self._receipts is not None:
                self._receipts.waive(False)

    async def _feed_stdin(self) -> None:
        await self._opened.wait()
        assert self.execution is not None
        try:
            while (data := await self._stdin.get()) is not None:
                await self.execution.stdin.write(data)
            await self.execution.stdin.close()
        except HutchError:
            self._stdin.shut()  # the command reads no more: what comes is thrown away

    async def _obey(self) -> None:
        await self._opened.wait()
        execution = self.execution
        assert execution is not None
        async for control in self._controls:
            action: Callable[[], Awaitable[None]]
            if control.type == "resize":
                action = functools.partial(execution.resize, control.rows, control.cols)
            elif control.sig in SIGNALS:
                action = functools.partial(execution.signal, control.sig)
            else:
                await self._tell("error", message=f"signal {control.sig} is not allowed")
                continue
            try:
                await action()
            except HutchError as error:
                await self._tell("error", message=error.message)


class _StdinQueue:
    """What the client has sent and the command has not taken yet, bounded by size."""

    def __init__(self) -> None:
        self._items: deque[bytes | None] = deque()
        self._size = 0
        self._limit: float = _STDIN_WAITING
        self._news = anyio.Event()
        self._taken = anyio.Event()
        self._shut = False

    def put(self, data: bytes | None) -> bool:
        """Add a piece, or the end; false when the caller should wait for room before the next."""
        if not self._shut:
            self._items.append(data)
            self._size += len(data or b"")
            self._news.set()
        return self._size <= self._limit

    async def room(self) -> None:
        """Wait until there is room."""
        while self._size > self._limit:
            self._taken = anyio.Event()
            await self._taken.wait()

    async def get(self) -> bytes | None:
        """Take the next piece; ``None`` is the end."""
        while not self._items:
            self._news = anyio.Event()
            await self._news.wait()
        data = self._items.popleft()
        self._size -= len(data or b"")
        self._taken.set()
        return data

    def shut(self) -> None:
        """Take no more."""
        self._shut = True
        self._limit = math.inf
        self._items.clear()
        self._taken.set()
