"""Connections from the host to the peers of boxes."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from typing import TYPE_CHECKING

import anyio

from hutch.core.policy import HOST_NAME
from hutch.errors import NetworkError
from hutch.net.relay import tune
from hutch.net.resolver import source_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hutch.core.policy import Address, Policy
    from hutch.net.resolver import Resolver

_CONNECT_SECONDS = 30.0
_NEXT_SECONDS = 5.0
_LOOPBACK = ipaddress.ip_address("127.0.0.1")


def is_own(address: Address) -> bool:
    """Whether an address is one of the host's."""
    return source_address(address) == address


async def connect(addresses: Sequence[Address], port: int) -> socket.socket:
    """Return a connected, non-blocking socket to the first address that answers. Raises `NetworkError`."""
    loop = asyncio.get_running_loop()
    reason = "nobody answers"
    for number, address in enumerate(addresses):
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        patience = _CONNECT_SECONDS if number == len(addresses) - 1 else _NEXT_SECONDS
        try:
            connection = socket.socket(family, socket.SOCK_STREAM)
            try:
                connection.setblocking(False)
                tune(connection)
                with anyio.fail_after(patience):
                    await loop.sock_connect(connection, (str(address), port))
            except BaseException:
                connection.close()
                raise
        except TimeoutError:
            reason = "it does not answer in time"
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
        else:
            return connection
    raise NetworkError(f"it cannot be reached: {reason}")


async def find(resolver: Resolver, policy: Policy, name: str, port: int) -> list[Address]:
    """Return the addresses of a name that the policy lets a box use. Raises `NetworkError`."""
    if name == HOST_NAME:
        return [_LOOPBACK]
    found = await resolver.addresses(name)
    usable = [each for each in found if policy.answer(name, each, port, own=is_own(each))]
    if not usable:
        raise NetworkError("the name leads to a private or reserved address, and no rule names it")
    return usable
