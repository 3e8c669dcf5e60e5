"""Published UDP ports: each client of the host's port has a tunnel of its own to the box's port, until it was quiet for
a while."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Any

import anyio

from hutch.core.packets import MOST_BYTES
from hutch.errors import HutchError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anyio.streams.memory import MemoryObjectReceiveStream

    from hutch.net.meter import Meter
    from hutch.runtime.ports import Host

log = logging.getLogger("hutch.net")

_MOST_CLIENTS = 64
_IDLE_SECONDS = 60.0
_WAITING = 64
_LENGTH_BYTES = 2
# linux/in.h; Python has no name for it.
_IP_PKTINFO = 8
_CONTROL_BYTES = 64
# What goes with an answer, so that it comes from the address that was asked.
_Control = tuple[tuple[int, int, bytes], ...]


class _Client:
    """One client. What it sent and the box did not take yet is bounded; more is lost."""

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self.put, self.waiting = anyio.create_memory_object_stream[bytes](_WAITING)
        self.touch()

    def touch(self) -> None:
        """It is not quiet."""
        self.scope.deadline = anyio.current_time() + _IDLE_SECONDS


async def serve_datagrams(receiver: socket.socket, box: Host, port: int, meter: Meter) -> None:
    """Pass datagrams that come to a socket of the host to a UDP port of the box, and its answers back to whom they are
    for, until cancelled. ``meter`` counts and limits them."""
    clients: dict[Any, _Client] = {}
    _tell_addresses(receiver)

    async def serve(peers: tuple[Any, _Control], client: _Client) -> None:
        try:
            with client.scope, client.put, client.waiting:
                await _Conversation(receiver, peers, client, meter).run(box, port)
        except* (HutchError, OSError) as errors:
            log.debug("a client of UDP port %s of box %s ended: %s", port, box.id, errors.exceptions)
        finally:
            if clients.get(peers) is client:
                del clients[peers]

    async with anyio.create_task_group() as tasks:
        while True:
            await anyio.wait_readable(receiver)
            try:
                data, control, _, address = receiver.recvmsg(MOST_BYTES, _CONTROL_BYTES)
            except OSError:  # nothing, or what became of an answer
                continue
            if meter.inward.pause():
                continue  # what is too fast is lost
            peers = address, _from_where_it_went(control)
            client = clients.get(peers)
            if client is None:
                if len(clients) >= _MOST_CLIENTS:
                    quietest = min(clients, key=lambda each: clients[each].scope.deadline)
                    clients.pop(quietest).scope.cancel()
                clients[peers] = client = _Client()
                meter.connections += 1
                tasks.start_soon(serve, peers, client)
            client.touch()
            try:
                client.put.send_nowait(data)
            except (anyio.WouldBlock, anyio.ClosedResourceError, anyio.BrokenResourceError):
                continue
            meter.inward.count(len(data))


class _Conversation:
    """The tunnel of one client."""

    def __init__(self, receiver: socket.socket, peers: tuple[Any, _Control], client: _Client, meter: Meter) -> None:
        self._receiver = receiver
        self._address, self._control = peers
        self._client = client
        self._meter = meter

    async def run(self, box: Host, port: int) -> None:
        """Serve until cancelled. Raises `NetworkError` when the tunnel ends."""
        async with await box.ports.connect_datagrams(port) as tunnel, anyio.create_task_group() as tasks:
            tasks.start_soon(self._pass_in, tunnel.send, self._client.waiting)
            held = bytearray()
            while data := await tunnel.receive():
                held += data
                self._answer(held)
            tasks.cancel_scope.cancel()

    async def _pass_in(self, send: Any, waiting: MemoryObjectReceiveStream[bytes]) -> None:
        async for data in waiting:
            await send(len(data).to_bytes(_LENGTH_BYTES, "big") + data)

    def _answer(self, held: bytearray) -> None:
        while len(held) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(held[:_LENGTH_BYTES], "big")
            if len(held) < end:
                return
            data = bytes(held[_LENGTH_BYTES:end])
            del held[:end]
            self._client.touch()
            if not self._meter.outward.pause():
                self._meter.outward.count(len(data))
                try:
                    self._receiver.sendmsg((data,), self._control, 0, self._address)
                except OSError as error:
                    log.debug("an answer to %s was not sent: %s", self._address, error)


def _tell_addresses(receiver: socket.socket) -> None:
    """Have each datagram tell to which address of the host it went: a socket may be at all of them."""
    if receiver.family == socket.AF_INET6:
        receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        receiver.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


def _from_where_it_went(control: Iterable[tuple[int, int, bytes]]) -> _Control:
    for level, kind, info in control:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):  # index of the interface, local address, address
            return ((level, kind, bytes(4) + info[4:8] + bytes(4)),)
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):  # address, index of the interface
            return ((level, kind, info[:16] + bytes(4)),)
    return ()
