"""The relay: one WebSocket for each watcher of an execution, which carries the agent protocol itself (docs/remote.md).

Nothing is remembered here. Positions, acknowledgements, credits and the exit are between the watcher and the agent,
so this process may die at any moment: the watcher comes back, here or to our successor, and goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from urllib.parse import unquote

import anyio
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from hutch.core import agentproto as proto
from hutch.core.frames import Decoder, FrameError
from hutch.core.relay import SILENCE, SUBPROTOCOL, Downward, Upward
from hutch.errors import (
    HutchError,
    InvalidArgumentError,
    UnauthenticatedError,
    UpstreamUnavailableError,
)
from hutch.server import extra
from hutch.server.envelope import envelope, request_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.routing import BaseRoute

    from hutch.sdk.base import Runtime
    from hutch.sdk.remote_link import RemoteLink
    from hutch.server.rules import Rules

_READ = 512 * 1024
_HELLO_SECONDS = 10.0
_REPLACE_SECONDS = 5.0


@runtime_checkable
class Local(Protocol):
    """A box of this machine: its agent is a socket away."""

    async def connect_agent(self, exec_id: str) -> socket.socket: ...

    def oom_kills(self) -> int | None: ...


@runtime_checkable
class Remote(Protocol):
    """A box of another machine: there is a relay beside it."""

    async def connect_relay(self, exec_id: str, watcher: str, oom_kills: int | None) -> RemoteLink: ...


def routes(backend: Runtime, rules: Rules) -> list[BaseRoute]:
    """All routes for our own SDK: the relay's, and those under ``/v1/x``."""
    relay = _Relay(backend, rules)
    socket_route = WebSocketRoute("/v1/boxes/{box}/executions/{execution}/relay", relay.serve)
    return [socket_route, *extra.routes(backend, rules)]


class _Relay:
    def __init__(self, backend: Runtime, rules: Rules) -> None:
        self._backend = backend
        self._rules = rules
        # The connection of each watcher: (to cancel it, set once it is gone).
        self._watchers: dict[tuple[str, str, str], tuple[anyio.CancelScope, anyio.Event]] = {}

    async def serve(self, ws: WebSocket) -> None:
        """Serve one watcher."""
        exec_id = unquote(ws.path_params["execution"])
        reading = ws.scope.get("hutch.principal") == "read"
        watcher = ws.query_params.get("watcher", "")[:64]
        try:
            oom_kills = _number(ws, "oom_kills")
            if SUBPROTOCOL not in ws.scope["subprotocols"]:
                raise InvalidArgumentError(f"the relay speaks the WebSocket sub-protocol {SUBPROTOCOL}; offer it")
            box = await self._backend.get(unquote(ws.path_params["box"]))
            async with self._alone((box.id, exec_id, watcher) if watcher else None):
                used = functools.partial(self._rules.used, box.id)
                if isinstance(box, Remote):
                    async with contextlib.aclosing(await _next_relay(box, exec_id, watcher, oom_kills)) as link:
                        await ws.accept(subprotocol=SUBPROTOCOL)
                        await _both(
                            ws, _link_down(ws, link), _up(ws, link.send, Upward(exec_id, None, used, reading=reading))
                        )
                elif isinstance(box, Local):
                    with await box.connect_agent(exec_id) as sock:
                        hello = await _greet(sock)
                        gate = Downward(exec_id, _oom_killed(box, oom_kills))
                        await ws.accept(subprotocol=SUBPROTOCOL)
                        await _both(
                            ws,
                            _agent_down(ws, sock, gate),
                            _up(ws, _sender(sock), Upward(exec_id, hello, used, reading=reading)),
                        )
                        await _hand_over(sock)
        except HutchError as error:
            await _refuse(ws, error)

    @contextlib.asynccontextmanager
    async def _alone(self, key: tuple[str, str, str] | None) -> AsyncIterator[None]:
        """Be this watcher's only connection. An earlier one, whose loss was not noticed here, would hold its
        unacknowledged output, and might still bring input."""
        if key is None:
            yield
            return
        while (other := self._watchers.get(key)) is not None:
            other[0].cancel()
            with anyio.move_on_after(_REPLACE_SECONDS) as patience:
                await other[1].wait()
            if patience.cancelled_caught:
                raise UpstreamUnavailableError("the watcher's earlier connection has not come to its end yet")
        gone = anyio.Event()
        try:
            with anyio.CancelScope() as scope:
                self._watchers[key] = scope, gone
                yield
        finally:
            del self._watchers[key]
            gone.set()


def _number(ws: WebSocket, name: str) -> int | None:
    text = ws.query_params.get(name)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 18:
        raise InvalidArgumentError(f"{name}: {text!r:.100} is not a number")
    return int(text)


def _oom_killed(box: Local, before: int | None) -> Callable[[], bool]:
    """Whether memory has run out in the box since the execution was started, or else since now."""
    known = box.oom_kills() if before is None else before

    def killed() -> bool:
        now = box.oom_kills()
        return known is not None and now is not None and now > known

    return killed


async def _next_relay(box: Remote, exec_id: str, watcher: str, oom_kills: int | None) -> RemoteLink:
    try:
        return await box.connect_relay(exec_id, watcher, oom_kills)
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


async def _receive(ws: WebSocket) -> bytes:
    """The next message. Raises `WebSocketDisconnect` at the end, and for a peer that is silent."""
    with anyio.move_on_after(SILENCE):
        message = await ws.receive()
        if message["type"] == "websocket.receive" and message.get("bytes") is not None:
            return bytes(message["bytes"])
    raise WebSocketDisconnect(1002)


async def _agent_down(ws: WebSocket, sock: socket.socket, gate: Downward) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(sock, _READ):
        if frames := gate.feed(data):
            await ws.send_bytes(frames)


def _sender(sock: socket.socket) -> Callable[[bytes], Awaitable[None]]:
    return functools.partial(asyncio.get_running_loop().sock_sendall, sock)


async def _up(ws: WebSocket, send: Callable[[bytes], Awaitable[None]], gate: Upward) -> None:
    while True:
        onward, answers = gate.feed(await _receive(ws))
        if onward:
            await send(onward)
        if answers:
            await ws.send_bytes(answers)


async def _link_down(ws: WebSocket, link: RemoteLink) -> None:
    while message := await link.receive():
        await ws.send_bytes(message)


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
        await ws.send_denial_response(envelope(error, request_id(ws.scope), details=True))
