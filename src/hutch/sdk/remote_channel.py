"""The agent's channel to a box behind a server: the agent protocol over a WebSocket to the server's relay."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING
from urllib.parse import quote

from hutch.core import agentproto as proto
from hutch.core.relay import HEARTBEAT, SILENCE
from hutch.runtime.channel import Channel
from hutch.sdk.remote_http import ConnectionFailed
from hutch.sdk.remote_socket import WebSocket
from hutch.sdk.remote_wire import Launched, dumps, error_from_body

if TYPE_CHECKING:
    from hutch.sdk.remote_http import Http
    from hutch.sdk.remote_wire import NextBody


class RemoteChannel(Channel):
    """Implements `hutch.runtime.channel.Channel`. Made by `open`."""

    def __init__(self, link: WebSocket) -> None:
        super().__init__()
        self._link = link
        self._heard = self._loop.time()
        self._timer = self._loop.call_later(HEARTBEAT, self._beat)
        # The answer that `launch` waits for.
        self._launched: asyncio.Future[str] | None = None
        link.on_message = self._on_message
        link.on_lost = self.close

    @classmethod
    async def open(
        cls, http: Http, box_id: str, exec_id: str, watcher: str, oom_kills: int | None = None
    ) -> RemoteChannel:
        """Connect to the relay of an execution. Raises what the server answers instead, or `ConnectionFailed`."""
        channel = cls(await dial(http, box_id, exec_id, watcher, oom_kills))
        await channel.greet()
        return channel

    async def launch(self, body: NextBody) -> Launched:
        """Start another command after the end of the one before. Raises what the server answers instead, or
        `ConnectionFailed`: then it may have been started."""
        if self.closed:
            raise ConnectionFailed("the connection to the server was lost")
        self._launched = self._loop.create_future()
        try:
            self._link.send(dumps(body).decode())
            answer = json.loads(await self._launched)
            if "error" in answer:
                raise error_from_body(answer["error"])
            return Launched(pid=int(answer["pid"]))
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise ConnectionFailed(f"the server answered what is not understood: {error}") from None
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._launched = None

    @property
    def reusable(self) -> bool:
        """Whether another command may be started here, once nothing of the one before is under way."""
        return not self.closed and all(answer.done() for answer in self._requests.values())

    def send(self, data: bytes) -> None:
        """Queue bytes for the agent."""
        if not self.closed:
            self._link.send(data)

    def _disconnect(self) -> None:
        self._timer.cancel()
        self._link.close()
        if self._launched is not None and not self._launched.done():
            self._launched.set_exception(ConnectionFailed("the connection to the server was lost"))

    def _on_message(self, message: bytes | bytearray | str) -> None:
        self._heard = self._loop.time()
        if self.closed:
            return
        if not isinstance(message, str):
            self._received(message)
        elif self._launched is not None and not self._launched.done():
            self._launched.set_result(message)

    def _beat(self) -> None:
        if self._loop.time() - self._heard > SILENCE:
            self.close()
            return
        self.send(proto.simple(proto.Request.PING, req=0))
        self._timer = self._loop.call_later(HEARTBEAT, self._beat)


class Left(Channel):
    """In the place of a channel that an ended execution has left to others."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = True

    def send(self, data: bytes) -> None:
        """Nothing is sent any more."""


async def dial(http: Http, box_id: str, exec_id: str, watcher: str, oom_kills: int | None = None) -> WebSocket:
    """Connect to the relay of an execution; an earlier connection of the same watcher ends there and then.
    ``oom_kills``: how often memory had run out in the box before, if that is known."""
    path = f"/v1/boxes/{quote(box_id, safe='')}/executions/{quote(exec_id, safe='')}/relay?watcher={quote(watcher)}"
    if oom_kills is not None:
        path += f"&oom_kills={oom_kills}"
    link = await WebSocket.dial(http.url + http.path(path), http.headers)
    http.sockets.add(link)
    return link
