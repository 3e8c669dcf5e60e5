"""The sockets of a gateway inside a box's network namespace (agent/door.c makes them)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from typing import TYPE_CHECKING

import anyio
import msgspec

from hutch.errors import NetworkError
from hutch.host.binary import agent_path
from hutch.host.proc import ended

if TYPE_CHECKING:
    from collections.abc import Iterator

NFT_REMEDY = "install nftables (apt-get install -y nftables)"
# Administrators' programs are often not on an ordinary user's path.
_PATH = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
_SECONDS = 20.0


class DoorSockets(msgspec.Struct, frozen=True):
    """Where the packets of a box end. TCP sockets listen, and an accepted connection knows where it was meant to go;
    DNS sockets get what was sent to port 53 by UDP, the other UDP sockets the rest, with its destination
    (IP_RECVORIGDSTADDR). Raw sockets send packets with headers into the namespace. The IPv6 ones are ``None`` where the
    kernel has no IPv6."""

    tcp4: socket.socket
    dns4: socket.socket
    udp4: socket.socket
    raw4: socket.socket
    tcp6: socket.socket | None = None
    dns6: socket.socket | None = None
    udp6: socket.socket | None = None
    raw6: socket.socket | None = None

    def all(self) -> Iterator[socket.socket]:
        """All that there are."""
        return (each for each in msgspec.structs.astuple(self) if each is not None)


def nft() -> str | None:
    """Return where nft(8) is."""
    return shutil.which("nft", path=_PATH)


async def open_door(pidfd: int) -> DoorSockets:
    """Make every packet in the network namespace of a process end at the returned sockets. May be done again: the new
    sockets take over.

    Raises `NetworkError` when this machine lacks what is needed.
    """
    if nft() is None:
        raise NetworkError(f"boxes cannot have a network here, nft is not installed: {NFT_REMEDY}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            helper = os.posix_spawn(  # noqa: ASYNC221 - it only starts
                agent_path(),
                ["box-agent", "door"],
                {"PATH": _PATH},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0), (os.POSIX_SPAWN_DUP2, pidfd, 3)],
                setsigmask=(),
            )
        try:
            ours.setblocking(False)
            with anyio.move_on_after(_SECONDS):
                await anyio.wait_readable(ours)
                return _received(ours)
        finally:
            with anyio.CancelScope(shield=True):
                await _reap(helper)
    raise NetworkError(f"the network of a box was not ready within {_SECONDS:g} s")


def _received(control: socket.socket) -> DoorSockets:
    text, descriptors, _, _ = socket.recv_fds(control, 4096, 8)
    sockets = [socket.socket(fileno=fd) for fd in descriptors]
    if text == b"D" and len(sockets) in (4, 8):
        return DoorSockets(*sockets)
    for each in sockets:
        each.close()
    words = text[1:].decode(errors="replace") or "its helper ended without a word"
    raise NetworkError(f"the network of a box cannot be made: {words}")


async def _reap(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        if not await ended(pidfd, 1.0):  # it has answered, or is given up
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await ended(pidfd, _SECONDS)
    finally:
        os.close(pidfd)
    os.waitpid(pid, os.WNOHANG)  # noqa: ASYNC222 - it has ended, and this does not wait
