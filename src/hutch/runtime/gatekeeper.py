"""How a runtime talks to the gateway of its home: the one background process that serves the doors and the published
ports of all its boxes (`hutch.runtime.gateway`). It is started when it is needed, and ends with its last box."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import msgspec

from hutch.errors import HutchError, NetworkError, by_code
from hutch.host import keeper, unixsocket
from hutch.host.proc import poll_until
from hutch.types import Outbound, PublishedPort

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.home import Home
    from hutch.types import BoxSpec

MODULE = "hutch.runtime.gateway"
SOCKET = "gateway.sock"
LOG = "gateway.log"
REQUEST_BYTES = 4096
_SECONDS = 30.0
_READY_SECONDS = 10.0
_FULL_LOG_BYTES = 1 << 20


class Request(msgspec.Struct, frozen=True):
    """One question: see to the network of a box as its record and the engine say (``sync``), or just report it."""

    box: str
    sync: bool


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """``code`` and ``message`` of an error, or what the box's network is: its published ports, bytes that went out and
    came in through its door, and connections."""

    code: str = ""
    message: str = ""
    ports: tuple[PublishedPort, ...] = ()
    sent: int = 0
    received: int = 0
    connections: int = 0


def is_served(spec: BoxSpec) -> bool:
    """Whether such a box needs the gateway."""
    return spec.network.outbound is not Outbound.DISABLED or bool(spec.network.ports or spec.secrets)


def listens(home: Path) -> bool:
    """Whether a gateway takes requests. The file of the socket alone means nothing: a killed one leaves it."""
    try:
        unixsocket.connect(home, SOCKET).close()
    except BlockingIOError:
        return True  # many wait
    except OSError:
        return False
    return True


class Gatekeeper:
    """The gateway of one home, as its users see it."""

    def __init__(self, home: Home) -> None:
        self._home = home

    async def sync(self, box_id: str) -> Reply:
        """Let the gateway do for a box what its record says. Returns when it is done. Raises `NetworkError` or what
        the gateway reports."""
        return await self._ask(Request(box_id, True), start=True)

    async def revive(self, box_id: str) -> None:
        """See to it that the gateway runs, which a running box of the home needs; it sees to all of them. Cheap when
        it does. Raises `NetworkError`."""
        try:
            await self._ask(Request(box_id, False), start=False)
        except NetworkError:
            await self.sync(box_id)

    async def report(self, box_id: str) -> Reply:
        """Return what went through the door of a box; zeros when nothing serves it."""
        try:
            return await self._ask(Request(box_id, False), start=False)
        except NetworkError:
            return Reply()

    # Private methods.

    async def _ask(self, request: Request, *, start: bool) -> Reply:
        with anyio.move_on_after(_SECONDS):
            while True:
                answer = b""
                with contextlib.suppress(OSError):
                    answer = await self._exchange(request)
                if answer:
                    reply = msgspec.json.decode(answer, type=Reply)
                    if reply.code:
                        raise by_code(reply.code)(reply.message)
                    return reply
                if not start:
                    raise NetworkError("the gateway does not run")
                await self._start()
        raise NetworkError(f"the gateway of {self._home.root} does not answer within {_SECONDS:g} s; see {LOG} there")

    async def _exchange(self, request: Request) -> bytes:
        """Return the answer; empty when the gateway ended meanwhile."""
        loop = asyncio.get_running_loop()
        with unixsocket.connect(self._home.root, SOCKET) as connection:
            await loop.sock_sendall(connection, msgspec.json.encode(request))
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while data := await loop.sock_recv(connection, 65536):
                answer += data
            return answer

    async def _start(self) -> None:
        log = self._home.root / LOG
        with contextlib.suppress(OSError):
            if log.stat().st_size > _FULL_LOG_BYTES:
                log.unlink()
        try:
            await anyio.to_thread.run_sync(keeper.start, log, MODULE, str(self._home.root))
        except HutchError as error:
            raise NetworkError(str(error)) from error
        await poll_until(lambda: listens(self._home.root), _READY_SECONDS)
