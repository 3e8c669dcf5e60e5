"""The agent's channel to a box behind a server: the agent protocol over a WebSocket to the server's relay."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from hutch.core import agentproto as proto
from hutch.core.relay import HEARTBEAT, SILENCE
from hutch.runtime.channel import Channel
from hutch.sdk.remote_socket import WebSocket

if TYPE_CHECKING:
    from hutch.sdk.remote_http import Http


class RemoteChannel(Channel):
    """Implements `hutch.runtime.channel.Channel`. Made by `open`."""

    def __init__(self, link: WebSocket) -> None:
        super().__init__()
        self._link = link
        self._heard = self._loop.time()
        self._timer = self._loop.call_later(HEARTBEAT, self._beat)
        link.on_message = self._on_message
        link.on_lost = self.close

    @classmethod
    async def open(cls, http: Http, box_id: str, exec_id: str, watcher: str, oom_kills: int | None) -> RemoteChannel:
        """Connect to the relay of an execution. Raises what the server answers instead, or `ConnectionFailed`."""
        channel = cls(await dial(http, box_id, exec_id, watcher, oom_kills))
        await channel.greet()
        return channel

    def send(self, data: bytes) -> None:
        """Queue bytes for the agent."""
        if not self.closed:
            self._link.send(data)

    def _disconnect(self) -> None:
        self._timer.cancel()
        self._link.close()

    def _on_message(self, message: bytes) -> None:
        self._heard = self._loop.time()
        if not self.closed:
            self._received(message)

    def _beat(self) -> None:
        if self._loop.time() - self._heard > SILENCE:
            self.close()
            return
        self.send(proto.simple(proto.Request.PING, req=0))
        self._timer = self._loop.call_later(HEARTBEAT, self._beat)


async def dial(http: Http, box_id: str, exec_id: str, watcher: str, oom_kills: int | None = None) -> WebSocket:
    """Connect to the relay of an execution; an earlier connection of the same watcher ends there and then.
    ``oom_kills``: how often memory had run out in the box before, if that is known."""
    path = f"/v1/boxes/{quote(box_id, safe='')}/executions/{quote(exec_id, safe='')}/relay?watcher={quote(watcher)}"
    if oom_kills is not None:
        path += f"&oom_kills={oom_kills}"
    return await WebSocket.dial(http.url + http.path(path), http.headers)
