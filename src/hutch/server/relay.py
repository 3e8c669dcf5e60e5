"""The relay: one WebSocket for each watcher of an execution, which carries the agent protocol itself (docs/remote.md).

Nothing is remembered here. Positions, acknowledgements, credits and the exit are between the watcher and the agent,
so this process may die at any moment: the watcher comes back, here or to our successor, and goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from urllib.parse import unquote

import anyio
from starlette.responses import JSONResponse
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from hutch.core import agentproto as proto
from hutch.core.frames import Decoder, FrameError
from hutch.core.relay import SILENCE, SUBPROTOCOL, Downward, Upward
from hutch.errors import (
    HutchError,
    InvalidArgumentError,
    PermissionDeniedError,
    UnauthenticatedError,
    UpstreamUnavailableError,
)
from hutch.sdk.remote_wire import NextBody, dumps, error_body, loads
from hutch.server import extra

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.routing import BaseRoute

    from hutch.sdk.base import Runtime
    from hutch.sdk.remote_link import RemoteLink
    from hutch.types import BoxInfo

_READ = 512 * 1024
_HELLO_SECONDS = 10.0
_REPLACE_SECONDS = 5.0

# What a watcher's connection is found by: its box, its execution, its own name.
_Key = tuple[str, str, str]


@runtime_checkable
class Local(extra.Host, Protocol):
    """A box of this machine: its agent is a socket away."""

    async def connect_agent(self, exec_id: str) -> socket.socket: ...


@runtime_checkable
class Remote(Protocol):
    """A box of another machine: there is a relay beside it."""

    async def connect_relay(self, exec_id: str, watcher: str) -> RemoteLink: ...


def routes(backend: Runtime, on_created: Callable[[BoxInfo], None] = lambda info: None) -> list[BaseRoute]:
    """All routes for our own SDK: the relay's, and those under ``/v1/x`` (which see for ``on_created``)."""
    relay = _Relay(backend)
    socket_route = WebSocketRoute("/v1/boxes/{box}/executions/{execution}/relay", relay.serve)
    return [socket_route, *extra.routes(backend, on_created)]


class _Relay:
    def __init__(self, backend: Runtime) -> None:
        self._backend = backend
        self._places: dict[_Key, _Place] = {}

    async def serve(self, ws: WebSocket) -> None:
        """Serve one watcher."""
        exec_id = unquote(ws.path_params["execution"])
        reading = ws.scope.get("hutch.principal") == "read"
        watcher = ws.query_params.get("watcher", "")[:64]
        try:
            if SUBPROTOCOL not in ws.scope["subprotocols"]:
                raise InvalidArgumentError(f"the relay speaks the WebSocket sub-protocol {SUBPROTOCOL}; offer it")
            box = await self._backend.get(unquote(ws.path_params["box"]))
            async with self._alone((box.id, exec_id, watcher) if watcher else None) as place:
                if isinstance(box, Remote) and reading:
                    raise PermissionDeniedError("this key may only read, and cannot watch from here")
                if isinstance(box, Remote):
                    async with contextlib.aclosing(await _next_relay(box, exec_id, watcher)) as link:
                        await ws.accept(subprotocol=SUBPROTOCOL)
                        await _both(ws, _link_down(ws, link), _link_up(ws, link))
                elif isinstance(box, Local):
                    with await box.connect_agent(exec_id) as sock:
                        hello = await _greet(sock)
                        await ws.accept(subprotocol=SUBPROTOCOL)
                        line = _Line(ws, sock, box, exec_id, hello, place, reading=reading)
                        await _both(ws, line.down(), line.up())
                        await _hand_over(sock)
        except HutchError as error:
            await _refuse(ws, error)

    @contextlib.asynccontextmanager
    async def _alone(self, key: _Key | None) -> AsyncIterator[_Place]:
        """Be this watcher's only connection. An earlier one, whose loss was not noticed here, would hold its
        unacknowledged output, and might still bring input."""
        while key is not None and (other := self._places.get(key)) is not None:
            other.scope.cancel()
            with anyio.move_on_after(_REPLACE_SECONDS) as patience:
                await other.gone.wait()
            if patience.cancelled_caught:
                raise UpstreamUnavailableError("the watcher's earlier connection has not come to its end yet")
        place = _Place(self._places)
        try:
            with place.scope:
                place.move(key)
                yield place
        finally:
            place.move(None)
            place.gone.set()


class _Place:
    """A watcher's connection, where the next one of the same watcher finds it."""

    def __init__(self, places: dict[_Key, _Place]) -> None:
        self.scope = anyio.CancelScope()
        self.gone = anyio.Event()
        self._places = places
        self._key: _Key | None = None

    def move(self, key: _Key | None) -> None:
        """Be found by another key."""
        if self._key is not None and self._places.get(self._key) is self:
            del self._places[self._key]
        self._key = key
        if key is not None:
            self._places[key] = self


class _Line:
    """Between a watcher's WebSocket and its connection to the agent."""

    def __init__(
        self,
        ws: WebSocket,
        sock: socket.socket,
        box: Local,
        exec_id: str,
        hello: bytes,
        place: _Place,
        *,
        reading: bool,
    ) -> None:
        self._ws = ws
        self._sock = sock
        self._box = box
        self._place = place
        self._reading = reading
        self._upward = Upward(exec_id, hello, reading=reading)
        self._downward = Downward(exec_id)
        self._loop = asyncio.get_running_loop()

    async def down(self) -> None:
        """From the agent to the watcher."""
        while data := await self._loop.sock_recv(self._sock, _READ):
            if frames := self._downward.feed(data):
                await self._ws.send_bytes(frames)  # type: ignore[arg-type]  # a view is as good

    async def up(self) -> None:
        """From the watcher to the agent."""
        while True:
            message = await _receive(self._ws)
            if isinstance(message, str):
                await self._ws.send_text(dumps(await self._next(message)).decode())
                continue
            onward, answers = self._upward.feed(message)
            if onward:
                await self._loop.sock_sendall(self._sock, onward)
            if answers:
                await self._ws.send_bytes(answers)

    async def _next(self, message: str) -> object:
        """Start the watcher's next command and relay that one."""
        try:
            if self._reading:
                raise PermissionDeniedError("this key may only read, and cannot start a command")
            body = loads(message.encode(), NextBody)
            launched = await extra.launch(self._box, body.exec)
        except HutchError as error:
            return error_body(error)
        self._upward.turn(body.exec.id)
        self._downward.turn(body.exec.id)
        self._place.move((self._box.id, body.exec.id, body.watcher[:64]))
        return launched


async def _next_relay(box: Remote, exec_id: str, watcher: str) -> RemoteLink:
    try:
        return await box.connect_relay(exec_id, watcher)
    except UnauthenticatedError as error:  # that is between us and the runner
        raise UpstreamUnavailableError(f"the box's runner does not know us: {error}") from None


async def _both(ws: WebSocket, down: object, up: object) -> None:
    """Run both directions until one of them ends."""

    async def run(direction: object) -> None:
        with contextlib.suppress(WebSocketDisconnect, OSError, FrameError, RuntimeError):
            await direction  # type: ignore[misc]
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, down)
        tasks.start_soon(run, up)
    with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError), anyio.move_on_after(1, shield=True):
        await ws.close()


async def _receive(ws: WebSocket) -> bytes | str:
    """The next message. Raises `WebSocketDisconnect` at the end, and for a peer that is silent."""
    with anyio.move_on_after(SILENCE):
        message = await ws.receive()
        if message["type"] == "websocket.receive":
            data = message.get("bytes")
            return str(message["text"]) if data is None else bytes(data)
    raise WebSocketDisconnect(1002)


async def _link_down(ws: WebSocket, link: RemoteLink) -> None:
    while message := await link.receive():
        if isinstance(message, str):
            await ws.send_text(message)
        else:
            await ws.send_bytes(message)  # type: ignore[arg-type]  # a bytearray is as good


async def _link_up(ws: WebSocket, link: RemoteLink) -> None:
    while True:
        await link.send(await _receive(ws))


async def _greet(sock: socket.socket) -> bytes:
    """Greet the agent for the watcher; return what it answered."""
    loop = asyncio.get_running_loop()
    decoder = Decoder()
    try:
        with anyio.fail_after(_HELLO_SECONDS):
            await loop.sock_sendall(sock, proto.hello(1))
            while data := await loop.sock_recv(sock, 4096):
                for frame in decoder.receive(data):
                    if isinstance(proto.decode_answer(frame), proto.Hello):
                        return frame.payload
                    raise UpstreamUnavailableError("the box's agent does not speak our protocol; restart the box")
    except (OSError, TimeoutError):
        pass
    raise UpstreamUnavailableError("the box's agent does not answer; stop the box if it stays like that")


async def _hand_over(sock: socket.socket) -> None:
    """Leave in order: once the agent has closed its side too, it has read all that the watcher sent."""
    loop = asyncio.get_running_loop()
    with anyio.move_on_after(1, shield=True), contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(sock, _READ):
            pass


async def _refuse(ws: WebSocket, error: HutchError) -> None:
    if ws.client_state.name == "DISCONNECTED" or ws.application_state.name != "CONNECTING":
        return
    with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
        await ws.send_denial_response(JSONResponse(error_body(error), error.status))
