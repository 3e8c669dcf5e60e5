"""The network card of a VM. Its other end is a stack within the emulator, which makes of each connection of the guest a
socket in the emulator's network namespace: whatever the guest sends, only what such a socket can say gets there.

It is a large parser of what the guest's root sends. So the card has no link, which means that the emulator throws away
what it sends, until the policy gives the box a network. A saved state (a template, or a box to be forked) contains
whether there is one."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hutch.engine.vm.qmp import Monitor

# From the ranges for documentation, like the addresses of containers (agent/door.c): no real peer has them.
_NETWORK = ipaddress.ip_network("192.0.2.128/28")
_NETWORK6 = ipaddress.ip_network("2001:db8:77:1::/64")
# Within each: the stack itself, the guest, and its name server, which nobody asks.
_STACK, _GUEST, _NAMES = 1, 2, 3

_NAME = "net"
_STACK_OPTIONS = (
    f"user,id={_NAME},net={_NETWORK},host={_NETWORK[_STACK]},dhcpstart={_NETWORK[_GUEST]},dns={_NETWORK[_NAMES]},"
    f"ipv6-net={_NETWORK6},ipv6-host={_NETWORK6[_STACK]},ipv6-dns={_NETWORK6[_NAMES]}"
)
ARGUMENTS = ("-netdev", _STACK_OPTIONS, "-device", f"virtio-net-pci,netdev={_NAME},romfile=")
"""Every machine has a card, or templates would not fit all; no guest uses it unasked."""

SETTINGS = (
    bytes((_NETWORK.prefixlen, _NETWORK6.prefixlen))
    + _NETWORK[_GUEST].packed
    + _NETWORK[_STACK].packed
    + _NETWORK6[_GUEST].packed
    + _NETWORK6[_STACK].packed
)
"""What the agent gives it (agent/nic.h)."""


async def plug(monitor: Monitor, *, up: bool) -> None:
    """Give the card of a machine a link, or take it away. Raises `EngineError`."""
    await monitor.command("set_link", name=_NAME, up=up)
