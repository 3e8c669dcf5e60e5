"""The relay: one WebSocket for each watcher of an execution, which carries the agent protocol itself (docs/remote.md).

Nothing is remembered here. Positions, acknowledgements, credits and the exit are between the watcher and the agent,
so this process may die at any moment: the watcher comes back, here or to our successor, and goes on where it was.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from urllib.parse import unquote

import anyio
import msgspec
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from hutch.core.frames import FrameError
from hutch.core.relay import SILENCE, SUBPROTOCOL, Downward, Upward
from hutch.errors import (
    HutchError,
    InvalidArgumentError,
    PermissionDeniedError,
    UnauthenticatedError,
    UpstreamUnavailableError,
)
from hutch.sdk.remote_wire import NextBody, dumps, loads
from hutch.server import extra
from hutch.server.envelope import body_of, envelope, request_id
from hutch.server.relay_agent import AgentSocket

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.routing import BaseRoute

    from hutch.sdk.base import Runtime
    from hutch.sdk.remote_link import RemoteLink
    from hutch.server.rules import Rules

_REPLACE_SECONDS = 5.0

# What a watcher's connection is found by: its box, its execution, its own name.
_Key = tuple[str, str, str]


@runtime_checkable
class Local(extra.Host, Protocol):
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
        self._places: dict[_Key, _Place] = {}

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
            async with self._alone((box.id, exec_id, watcher) if watcher else None) as place:
                client = _Client(ws, box.id, place, self._rules, reading=reading)
                if isinstance(box, Remote):
                    async with contextlib.aclosing(await _next_relay(box, exec_id, watcher, oom_kills)) as link:
                        await ws.accept(subprotocol=SUBPROTOCOL)
                        await _both(ws, _LinkLine(client, exec_id, link))
                elif isinstance(box, Local):
                    with AgentSocket(await box.connect_agent(exec_id), exec_id) as agent:
                        hello = await agent.greet()
                        await ws.accept(subprotocol=SUBPROTOCOL)
                        await _both(ws, _AgentLine(client, exec_id, box, agent, hello, oom_kills))
                        await agent.leave()
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


class _Client:
    """A watcher, and what it may do."""

    def __init__(self, ws: WebSocket, box_id: str, place: _Place, rules: Rules, *, reading: bool) -> None:
        self.ws = ws
        self.reading = reading
        self.used = functools.partial(rules.used, box_id)
        self._box_id = box_id
        self._place = place
        self._rules = rules

    def admit(self, message: str) -> NextBody:
        """Check the watcher's wish for another command, and return what it gets. Raises what it may not have."""
        if self.reading:
            raise PermissionDeniedError("this key may only read, and cannot start a command")
        body = loads(message.encode(), NextBody)
        body = msgspec.structs.replace(body, exec=self._rules.starting(body.exec))
        self._rules.commanded(self._box_id)
        return body

    def move(self, body: NextBody) -> None:
        """From now on it watches this execution."""
        self._place.move((self._box_id, body.exec.id, body.watcher[:64]))


class _Line:
    """Between a watcher and what is behind this relay."""

    def __init__(self, client: _Client, exec_id: str, hello: bytes | None) -> None:
        self._client = client
        self._ws = client.ws
        self._upward = Upward(exec_id, hello, client.used, reading=client.reading)

    async def down(self) -> None:
        """From the box to the watcher."""
        raise NotImplementedError

    async def up(self) -> None:
        """From the watcher to the box."""
        while True:
            message = await _receive(self._ws)
            if isinstance(message, str):
                try:
                    await self._start(self._client.admit(message))
                except HutchError as error:
                    answer = body_of(error, request_id(self._ws.scope), details=True)
                    await self._ws.send_text(dumps(answer).decode())
                continue
            onward, answers = self._upward.feed(message)
            if onward:
                await self._send(onward)
            if answers:
                await self._ws.send_bytes(answers)

    async def _send(self, data: bytes) -> None:
        raise NotImplementedError

    async def _start(self, body: NextBody) -> None:
        """Start the watcher's next command and relay that one."""
        raise NotImplementedError


class _AgentLine(_Line):
    """To the agent of a box of this machine."""

    def __init__(
        self, client: _Client, exec_id: str, box: Local, agent: AgentSocket, hello: bytes, oom_kills: int | None
    ) -> None:
        super().__init__(client, exec_id, hello)
        self._box = box
        self._agent = agent
        self._downward = Downward(exec_id, _oom_killed(box, oom_kills), agent)

    async def down(self) -> None:
        while data := await self._agent.read():
            for frames in self._downward.feed(data):
                await self._ws.send_bytes(frames)  # type: ignore[arg-type]  # a view is as good

    async def _send(self, data: bytes) -> None:
        await self._agent.send(data)

    async def _start(self, body: NextBody) -> None:
        launched = await extra.launch(self._box, body.exec)
        self._upward.turn(body.exec.id)
        self._agent.turn(body.exec.id)
        self._downward.turn(body.exec.id, _oom_killed(self._box, launched.oom_kills))
        self._client.move(body)
        await self._ws.send_text(dumps(launched).decode())


class _LinkLine(_Line):
    """To the relay beside a box of another machine, which answers for it."""

    def __init__(self, client: _Client, exec_id: str, link: RemoteLink) -> None:
        super().__init__(client, exec_id, None)
        self._link = link

    async def down(self) -> None:
        while message := await self._link.receive():
            if isinstance(message, str):
                await self._ws.send_text(message)
            else:
                await self._ws.send_bytes(message)  # type: ignore[arg-type]  # a bytearray is as good

    async def _send(self, data: bytes) -> None:
        await self._link.send(data)

    async def _start(self, body: NextBody) -> None:
        # What comes behind the wish is about that command, if there will be one.
        self._upward.turn(body.exec.id)
        self._client.move(body)
        await self._link.send(dumps(body).decode())


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


async def _both(ws: WebSocket, line: _Line) -> None:
    """Run both directions until one of them ends."""

    async def run(direction: Callable[[], Awaitable[None]]) -> None:
        with contextlib.suppress(WebSocketDisconnect, OSError, FrameError, RuntimeError):
            await direction()
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, line.down)
        tasks.start_soon(run, line.up)
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


async def _refuse(ws: WebSocket, error: HutchError) -> None:
    if ws.client_state.name == "DISCONNECTED" or ws.application_state.name != "CONNECTING":
        return
    with contextlib.suppress(WebSocketDisconnect, RuntimeError, OSError):
        await ws.send_denial_response(envelope(error, request_id(ws.scope), details=True))
