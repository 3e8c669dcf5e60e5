"""TLS of a box that ends here, at a host of its secrets: towards the box the gateway is the host, and towards the host
the box."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import anyio

from hutch.core import httphost
from hutch.errors import NetworkError
from hutch.net import http2
from hutch.net.http import Exchange, Malformed, Peers, Refused
from hutch.net.intercept import HTTP1, HTTP2
from hutch.net.link import TlsLink

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import h11

    from hutch.core.http2 import Fields
    from hutch.core.sniff import Sniffer
    from hutch.net.intercept import Interceptor
    from hutch.net.link import Link

_HELLO_SECONDS = 15.0
# A connection that has waited longer may have been given up by the host.
_EARLY_SECONDS = 5.0


async def terminate(
    interceptor: Interceptor, hello: Sniffer, port: int, below: Link, connect: Callable[[], Awaitable[Link]]
) -> None:
    """Serve the connection whose beginning is ``hello``, until it ends; ``connect`` reaches the host that it names.

    Raises `Refused` for what is not allowed, and for what cannot be looked into: that is noted, so that the next
    connection of such a client passes where the secrets' owner wants that. Raises `NetworkError` and `OSError` for
    a host that cannot be reached and a connection that broke.
    """
    host = _Host(interceptor, hello.name, port, connect)
    try:
        # What the box is told to speak is what the host speaks. A host that cannot be reached is told of in HTTP/1.1.
        if HTTP2.encode() in hello.protocols and interceptor.has_room_for_http2():
            with contextlib.suppress(NetworkError):
                await host.ask_for_http2()
        box = TlsLink(below, interceptor.server_context(hello.name, host.protocol))
        try:
            with anyio.fail_after(_HELLO_SECONDS):
                await box.handshake()
        except OSError as error:
            interceptor.note_opaque(hello, port)
            raise Refused(f"TLS with the box fails; it may not trust the gateway here ({error})") from None
        try:
            requests = await host.serve(box)
        except Malformed:
            interceptor.note_opaque(hello, port)
            raise
        if not requests:
            interceptor.note_opaque(hello, port)
            raise Refused("the client asked for nothing once it saw the gateway's certificate; it may want another")
    finally:
        host.close()


class _Host:
    """The host's side of such a connection."""

    def __init__(self, interceptor: Interceptor, name: str, port: int, connect: Callable[[], Awaitable[Link]]) -> None:
        self._interceptor = interceptor
        self._name = name
        self._port = port
        self._connect = connect
        self._early: TlsLink | None = None
        self._early_at = 0.0

    @property
    def protocol(self) -> str:
        """What is spoken with it."""
        return HTTP2 if self._early is not None and self._early.protocol == HTTP2 else HTTP1

    async def ask_for_http2(self) -> None:
        """Connect, so that `protocol` is known."""
        self._early = await self._reach(http2=True)
        self._early_at = anyio.current_time()

    async def serve(self, box: TlsLink) -> int:
        """Serve the box, and return how many requests it made."""
        if self._early is not None and self.protocol == HTTP2:
            streams = http2.Exchange(box, self._early, self._fill_fields)
            with self._interceptor.counting_http2():
                await streams.run()
            return streams.requests
        exchange = Exchange(box, Peers(self._open, self._fill, self._port))
        await exchange.run()
        return exchange.requests

    def close(self) -> None:
        """Close what nobody made use of."""
        if self._early is not None:
            self._early.close()

    async def _open(self, host: str) -> TlsLink:
        if host != self._name:
            raise Refused("Host names another host than TLS does")
        early, self._early = self._early, None
        if early is not None:
            if anyio.current_time() - self._early_at < _EARLY_SECONDS:
                return early
            early.close()
        return await self._reach(http2=False)

    async def _reach(self, *, http2: bool) -> TlsLink:
        far = TlsLink(await self._connect(), self._interceptor.client_context(http2=http2), server_name=self._name)
        try:
            with anyio.fail_after(_HELLO_SECONDS):
                await far.handshake()
        except BaseException as error:
            far.close()
            if isinstance(error, OSError):
                raise NetworkError(f"TLS to it fails: {error}") from error
            raise
        return far

    def _fill(self, host: str, request: h11.Request) -> h11.Request:
        return self._interceptor.fill(host, self._port, request)

    def _fill_fields(self, fields: Fields) -> Fields:
        """Raises `ValueError` for a request that is not for this host."""
        name, port = httphost.host_of_fields(fields)
        if name != self._name:
            raise ValueError("the authority names another host than TLS does")
        if port not in (None, self._port):
            raise ValueError(f"the authority names port {port}, and the connection is to port {self._port}")
        return self._interceptor.fill_fields(name, self._port, httphost.with_authority(fields))
