"""UDP of one box: each conversation of a port of the box with a peer has a socket of its own on the host, connected to
that peer, so nobody else can answer. A conversation ends when it was quiet for a while, when the policy forbids it, or
when too many newer ones have begun."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import struct
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import anyio

from hutch.core.packets import MOST_BYTES, End, datagram, refusal
from hutch.core.policy import plain_address
from hutch.net.http import Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from hutch.core.policy import Address
    from hutch.net.meter import Meter

_MOST_FLOWS = 512
_IDLE_SECONDS = 60.0
_SWEEP_SECONDS = 5.0
# One box's datagrams in one turn of the event loop.
_AT_ONCE = 32
_SOL_IPV6, _IP_RECVORIGDSTADDR, _IPV6_RECVORIGDSTADDR = 41, 20, 74


class Way(NamedTuple):
    """Where datagrams of one version of IP come from a box, and where answers go into it."""

    receiver: socket.socket
    raw: socket.socket


class _Flow:
    """One conversation."""

    def __init__(self, way: Way, box: End, peer: End, target: Address) -> None:
        """Raises `OSError` when the peer cannot be reached."""
        self.way, self.box, self.peer = way, box, peer
        self.used = time.monotonic()
        family = socket.AF_INET if target.version == 4 else socket.AF_INET6
        self.socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self.socket.connect((str(target), peer.port))
        except BaseException:
            self.socket.close()
            raise
        self.fd = self.socket.fileno()


class Flows:
    """See the module. ``judge`` tells where the datagrams of a new conversation go, or raises what is logged as the
    reason (`Refused`); ``may_stay`` says whether one may go on."""

    def __init__(
        self,
        judge: Callable[[End], Address],
        may_stay: Callable[[End], bool],
        refuse: Callable[[End, str], None],
        meter: Meter,
    ) -> None:
        self._judge = judge
        self._may_stay = may_stay
        self._refuse = refuse
        self._meter = meter
        self._loop = asyncio.get_running_loop()
        self._flows: OrderedDict[tuple[End, End], _Flow] = OrderedDict()

    async def run(self, ways: list[Way]) -> None:
        """Serve until cancelled."""
        for way in ways:
            self._loop.add_reader(way.receiver.fileno(), self._take, way)
        try:
            while True:
                await anyio.sleep(_SWEEP_SECONDS)
                self._sweep()
        finally:
            for way in ways:
                self._loop.remove_reader(way.receiver.fileno())
            while self._flows:
                self._end(next(iter(self._flows.values())))

    def judge_anew(self) -> None:
        """End the conversations that are not allowed any more."""
        for flow in list(self._flows.values()):
            if not self._may_stay(flow.peer):
                self._end(flow)
                self._refuse(flow.peer, "the policy was changed")

    # From the box.

    def _take(self, way: Way) -> None:
        for _ in range(_AT_ONCE):
            try:
                data, marks, _, sender = way.receiver.recvmsg(MOST_BYTES, 128)
            except OSError:  # nothing more, mostly
                return
            peer = _destination(marks)
            if peer is not None:
                self._send(way, End(ipaddress.ip_address(sender[0]), sender[1]), peer, data)

    def _send(self, way: Way, box: End, peer: End, data: bytes) -> None:
        flow = self._flows.get((box, peer))
        if flow is None:
            try:
                flow = self._begin(way, box, peer)
            except (Refused, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) else None
                self._refuse(peer, f"it cannot be reached: {reason}" if reason else str(error))
                self._tell(way, box, refusal(box, peer, forbidden=True))
                return
        flow.used = time.monotonic()
        self._flows.move_to_end((box, peer))
        if self._meter.outward.pause():
            return  # what is too fast is lost, as it is on a slow line
        try:
            flow.socket.send(data)
        except ConnectionRefusedError:  # what became of an earlier one
            self._tell(way, box, refusal(box, peer, forbidden=False))
        except OSError:
            pass  # too long for the way, or no way: datagrams may be lost
        else:
            self._meter.outward.count(len(data))

    def _begin(self, way: Way, box: End, peer: End) -> _Flow:
        flow = _Flow(way, box, peer, self._judge(End(plain_address(peer.address), peer.port)))
        while len(self._flows) >= _MOST_FLOWS:
            self._end(next(iter(self._flows.values())))
        self._flows[box, peer] = flow
        self._meter.connections += 1
        self._loop.add_reader(flow.fd, self._answer, flow)
        return flow

    # To the box.

    def _answer(self, flow: _Flow) -> None:
        for _ in range(_AT_ONCE):
            try:
                data = flow.socket.recv(MOST_BYTES)
            except ConnectionRefusedError:
                self._tell(flow.way, flow.box, refusal(flow.box, flow.peer, forbidden=False))
                continue
            except OSError:
                return
            flow.used = time.monotonic()
            self._flows.move_to_end((flow.box, flow.peer))
            if self._meter.inward.pause():
                continue
            self._meter.inward.count(len(data))
            self._tell(flow.way, flow.box, datagram(flow.peer, flow.box, data))

    def _tell(self, way: Way, box: End, packet: bytes) -> None:
        with contextlib.suppress(OSError):  # the box does not take more
            way.raw.sendto(packet, (str(box.address), 0))

    # Ends.

    def _sweep(self) -> None:
        """The quiet ones are in front."""
        eldest = time.monotonic() - _IDLE_SECONDS
        while self._flows and (flow := next(iter(self._flows.values()))).used < eldest:
            self._end(flow)

    def _end(self, flow: _Flow) -> None:
        self._loop.remove_reader(flow.fd)
        del self._flows[flow.box, flow.peer]
        flow.socket.close()


def _destination(marks: list[tuple[int, int, bytes]]) -> End | None:
    for level, kind, value in marks:
        if (level, kind) == (socket.SOL_IP, _IP_RECVORIGDSTADDR):
            (port,) = struct.unpack_from(">H", value, 2)
            return End(ipaddress.IPv4Address(value[4:8]), port)
        if (level, kind) == (_SOL_IPV6, _IPV6_RECVORIGDSTADDR):
            (port,) = struct.unpack_from(">H", value, 2)
            return End(ipaddress.IPv6Address(value[8:24]), port)
    return None
