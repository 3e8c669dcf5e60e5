"""TLS of a box that ends here, at a host of its secrets: towards the box the gateway is the host, and towards the host
the box."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from hutch.errors import NetworkError
from hutch.net.http import Exchange, Malformed, Peers, Refused
from hutch.net.link import TlsLink

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hutch.core.sniff import Sniffer
    from hutch.net.intercept import Interceptor
    from hutch.net.link import Link

_HELLO_SECONDS = 15.0


async def terminate(
    interceptor: Interceptor, hello: Sniffer, port: int, below: Link, connect: Callable[[], Awaitable[Link]]
) -> None:
    """Serve the connection whose beginning is ``hello``, until it ends; ``connect`` reaches the host that it names.

    Raises `Refused` for what is not allowed, and for what cannot be looked into: that is noted, so that the next
    connection of such a client passes where the secrets' owner wants that. Raises `NetworkError` and `OSError` for
    a host that cannot be reached and a connection that broke.
    """
    name = hello.name
    box = TlsLink(below, interceptor.server_context(name))
    try:
        with anyio.fail_after(_HELLO_SECONDS):
            await box.handshake()
    except OSError as error:
        interceptor.note_opaque(hello, port)
        raise Refused(f"TLS with the box fails; it may not trust the gateway here ({error})") from None

    async def reach(host: str) -> TlsLink:
        if host != name:
            raise Refused("Host names another host than TLS does")
        far = TlsLink(await connect(), interceptor.client_context, server_name=name)
        try:
            with anyio.fail_after(_HELLO_SECONDS):
                await far.handshake()
        except OSError as error:
            far.close()
            raise NetworkError(f"TLS to it fails: {error}") from error
        return far

    exchange = Exchange(box, Peers(reach, lambda host, request: interceptor.fill(host, port, request), port))
    try:
        await exchange.run()
    except Malformed:
        interceptor.note_opaque(hello, port)
        raise
    if not exchange.requests:
        interceptor.note_opaque(hello, port)
        raise Refused("the client asked for nothing once it saw the gateway's certificate; it may want the host's own")
