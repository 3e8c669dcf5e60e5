"""The door of one box: takes every connection that the box makes, judges it, and joins it with its peer.

A connection that the policy allows by its address is passed on as it is. Where names are allowed, the door reads who is
meant (TLS SNI; HTTP Host, of each request), looks that name up itself and connects to what it found.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
import struct
from typing import TYPE_CHECKING

import anyio

from hutch.core.packets import End
from hutch.core.policy import GATEWAY_ADDRESS, Policy, Verdict, plain_address
from hutch.core.sniff import LIMIT, Kind, Sniffer
from hutch.errors import NetworkError
from hutch.net import upstream
from hutch.net.dns import NameService
from hutch.net.flows import Flows, Way
from hutch.net.http import Exchange, Peers, Refused
from hutch.net.link import PlainLink
from hutch.net.relay import Relay, end_at_close, reset_at_close, tune
from hutch.net.terminate import terminate

if TYPE_CHECKING:
    import h11

    from hutch.core.policy import Address
    from hutch.host.netns import DoorSockets
    from hutch.net.intercept import Interceptor
    from hutch.net.journal import Journal
    from hutch.net.meter import Meter
    from hutch.net.resolver import Resolver

log = logging.getLogger("hutch.net")

_DNS_PORT = 53
_HELLO_SECONDS = 15.0
_MOST_CONNECTIONS = 4096
_ORIGINAL_DESTINATION = 80
_SOL_IPV6 = 41
_LOOPBACK = ipaddress.ip_address("127.0.0.1")
_GATEWAY = ipaddress.ip_address(GATEWAY_ADDRESS)


class _Call:
    """One connection of a box, as long as it lives. ``name``: by which it was admitted."""

    def __init__(self, peer: Address, port: int) -> None:
        self.peer = peer
        self.port = port
        self.name = ""
        # Whether it was neither admitted nor refused yet.
        self.open_question = False
        self.scope = anyio.CancelScope()

    def __str__(self) -> str:
        return str(End(self.peer, self.port))


class Door:
    """See the module. `run` serves until it is cancelled; `admit` changes the policy meanwhile."""

    def __init__(
        self,
        sockets: DoorSockets,
        policy: Policy,
        resolver: Resolver,
        journal: Journal,
        meter: Meter,
        interceptor: Interceptor | None = None,
    ) -> None:
        self._sockets = sockets
        self._meter = meter
        self._policy = policy
        self._resolver = resolver
        self._journal = journal
        self._interceptor = interceptor
        self._names = NameService(resolver, lambda: self._policy, journal)
        self._calls: set[_Call] = set()
        self._flows = Flows(self._judge_datagram, self._may_stay_datagram, self._refuse_datagram, meter)

    async def run(self) -> None:
        """Serve; the sockets are closed in the end."""
        try:
            async with anyio.create_task_group() as tasks:
                for listener in (self._sockets.tcp4, self._sockets.tcp6):
                    if listener is not None:
                        tasks.start_soon(self._accept, listener, tasks)
                for receiver in (self._sockets.dns4, self._sockets.dns6):
                    if receiver is not None:
                        tasks.start_soon(self._answer_datagrams, receiver, tasks)
                ways = [Way(self._sockets.udp4, self._sockets.raw4)]
                if self._sockets.udp6 is not None and self._sockets.raw6 is not None:
                    ways.append(Way(self._sockets.udp6, self._sockets.raw6))
                tasks.start_soon(self._flows.run, ways)
        finally:
            for each in self._sockets.all():
                each.close()

    def admit(self, policy: Policy) -> None:
        """Judge by another policy from now on; connections that it does not allow end."""
        self._policy = policy
        for call in list(self._calls):
            if not self._may_stay(call):
                self._refuse(call, "the policy was changed")
                call.scope.cancel()
        self._flows.judge_anew()

    # TCP.

    async def _accept(self, listener: socket.socket, tasks: anyio.abc.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED):
                    raise
                await anyio.sleep(0.05)  # what is lacking comes back when connections end
                continue
            peer = _destination(connection)
            if peer is None or len(self._calls) >= _MOST_CONNECTIONS:
                reset_at_close(connection)
                connection.close()
            else:
                tasks.start_soon(self._serve, connection, _Call(*peer))

    async def _serve(self, connection: socket.socket, call: _Call) -> None:
        self._calls.add(call)
        self._meter.connections += 1
        try:
            with call.scope:
                tune(connection)
                reset_at_close(connection)
                await self._judge(connection, call)
                end_at_close(connection)
        except (Refused, NetworkError) as error:
            self._refuse(call, str(error))
        except OSError as error:
            log.debug("a connection to %s ended: %s", call, error)
        except Exception:
            log.exception("a connection to %s failed", call)
        finally:
            self._calls.discard(call)
            connection.close()

    async def _judge(self, connection: socket.socket, call: _Call) -> None:
        if call.port == _DNS_PORT:
            await self._answer_stream(connection)
            return
        match self._verdict(call.peer, call.port):
            case Verdict.ALLOW:
                await self._admit(connection, call)
            case Verdict.ASK:
                call.open_question = True
                await self._ask(connection, call)
            case Verdict.REFUSE:
                raise Refused("the policy has no rule for the address")

    async def _admit(self, connection: socket.socket, call: _Call) -> None:
        beginning = b""
        if self._interceptor is not None and self._interceptor.has_port(call.port):
            sniffer = await self._sniff(connection)
            if self._interceptor.is_for(sniffer.name, call.port):
                await self._intercept(connection, call, sniffer)
                return
            beginning = bytes(sniffer.data)
        await self._join(connection, await upstream.connect([_target(call.peer)], call.port), beginning)

    def _verdict(self, peer: Address, port: int) -> Verdict:
        if peer != _GATEWAY:
            return self._policy.address(peer, port, own=upstream.is_own(peer))
        verdict = self._policy.address(_LOOPBACK, port)
        return Verdict.ALLOW if verdict is Verdict.REFUSE and self._policy.host(port) else verdict

    def _may_stay(self, call: _Call) -> bool:
        if call.name:
            return self._policy.name(call.name, call.port)
        verdict = self._verdict(call.peer, call.port)
        return verdict is Verdict.ALLOW or (verdict is Verdict.ASK and call.open_question)

    async def _ask(self, connection: socket.socket, call: _Call) -> None:
        sniffer = await self._sniff(connection)
        if sniffer.kind is Kind.HTTP:
            box = PlainLink(connection, self._meter.outward, bytes(sniffer.data))
            await Exchange(box, Peers(lambda name: self._open(call, name), _unchanged, call.port)).run()
        elif self._interceptor is not None and self._interceptor.is_for(sniffer.name, call.port):
            await self._intercept(connection, call, sniffer)
        elif sniffer.kind is Kind.TLS and sniffer.name:
            await self._join(connection, await self._connect(call, sniffer.name), bytes(sniffer.data))
        elif sniffer.kind is Kind.TLS:
            raise Refused("only names are allowed, and TLS does not tell the name (or hides it)")
        else:
            raise Refused("only names are allowed, and this is neither TLS nor HTTP")

    async def _intercept(self, connection: socket.socket, call: _Call, sniffer: Sniffer) -> None:
        """Read along, or pass on what cannot be read where that is wanted."""
        assert self._interceptor is not None
        if self._interceptor.passes(sniffer, call.port):
            await self._join(connection, await self._connect(call, sniffer.name), bytes(sniffer.data))
            return
        box = PlainLink(connection, self._meter.outward, bytes(sniffer.data))
        await terminate(self._interceptor, sniffer, call.port, box, lambda: self._open(call, sniffer.name))

    async def _sniff(self, connection: socket.socket) -> Sniffer:
        sniffer = Sniffer()
        loop = asyncio.get_running_loop()
        with anyio.move_on_after(_HELLO_SECONDS):
            while sniffer.kind is None and (data := await loop.sock_recv(connection, LIMIT)):
                sniffer.feed(data)
        return sniffer

    async def _open(self, call: _Call, name: str) -> PlainLink:
        return PlainLink(await self._connect(call, name), self._meter.inward)

    async def _connect(self, call: _Call, name: str) -> socket.socket:
        call.name, call.open_question = name, False
        if not self._policy.name(name, call.port):
            raise Refused("the policy has no rule for the name")
        return await upstream.connect(await upstream.find(self._resolver, self._policy, name, call.port), call.port)

    async def _join(self, near: socket.socket, far: socket.socket, beginning: bytes = b"") -> None:
        if beginning:
            try:
                await asyncio.get_running_loop().sock_sendall(far, beginning)
            except BaseException:
                far.close()
                raise
            self._meter.outward.count(len(beginning))
        await Relay(near, far, self._meter).run()

    # UDP.

    def _judge_datagram(self, peer: End) -> Address:
        if self._interceptor is not None and self._interceptor.has_port(peer.port):
            raise Refused("hosts of secrets have this port, and they are reached by TCP")
        match self._verdict(*peer):
            case Verdict.ASK:
                raise Refused("only names are allowed, and UDP does not tell one")
            case Verdict.REFUSE:
                raise Refused("the policy has no rule for the address")
        return _target(peer.address)

    def _may_stay_datagram(self, peer: End) -> bool:
        return self._verdict(*peer) is Verdict.ALLOW

    def _refuse_datagram(self, peer: End, reason: str) -> None:
        self._meter.refused += 1
        self._journal.refuse("udp", str(peer), reason)

    # DNS.

    async def _answer_stream(self, connection: socket.socket) -> None:
        link = PlainLink(connection)
        data = b""
        while True:
            while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
                with anyio.fail_after(_HELLO_SECONDS):
                    more = await link.receive()
                if not more:
                    return
                data += more
            end = 2 + int.from_bytes(data[:2], "big")
            answer = await self._names.answer(data[2:end], stream=True)
            data = data[end:]
            if answer is None:
                return
            await link.send(len(answer).to_bytes(2, "big") + answer)

    async def _answer_datagrams(self, receiver: socket.socket, tasks: anyio.abc.TaskGroup) -> None:
        while True:
            await anyio.wait_readable(receiver)
            with contextlib.suppress(OSError):
                wire, sender = receiver.recvfrom(4096)
                tasks.start_soon(self._answer_datagram, receiver, wire, sender)

    async def _answer_datagram(self, receiver: socket.socket, wire: bytes, sender: tuple[str, int]) -> None:
        try:
            answer = await self._names.answer(wire, stream=False)
            if answer is not None:
                receiver.sendto(answer, sender)
        except OSError as error:
            log.debug("an answer to %s was not sent: %s", sender, error)
        except Exception:
            log.exception("a lookup failed")

    # Private methods.

    def _refuse(self, call: _Call, reason: str) -> None:
        self._meter.refused += 1
        self._journal.refuse("tcp", str(call), reason, call.name)


def _target(peer: Address) -> Address:
    return _LOOPBACK if peer == _GATEWAY else peer


def _unchanged(name: str, request: h11.Request) -> h11.Request:
    return request


def _destination(connection: socket.socket) -> tuple[Address, int] | None:
    """Where a redirected connection was meant to go; ``None`` for one that was meant for the gateway's socket."""
    four = connection.family == socket.AF_INET
    try:
        raw = connection.getsockopt(socket.SOL_IP if four else _SOL_IPV6, _ORIGINAL_DESTINATION, 28)
    except OSError:
        return None
    (port,) = struct.unpack_from(">H", raw, 2)
    address = plain_address(ipaddress.ip_address(raw[4:8] if four else raw[8:24]))
    return None if (str(address), port) == connection.getsockname()[:2] else (address, port)
