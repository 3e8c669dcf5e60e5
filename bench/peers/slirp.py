"""slirp4netns, the network of rootless containers: a process with a TCP/IP stack that serves a namespace."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from bench.peers.base import PeerError, end_process

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "10.0.2.2"
"""The address of the host's loopback in such a namespace."""
_MTU = 65520


@contextlib.contextmanager
def namespace() -> Iterator[list[str]]:
    """Make a network namespace that slirp4netns serves, with the MTU that podman gives it; yields the words that run a
    command there. Raises `PeerError`."""
    if shutil.which("slirp4netns") is None:
        raise PeerError("slirp4netns is not installed")
    holder = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    ready, told = os.pipe()
    slirp = None
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        slirp = subprocess.Popen(
            ["slirp4netns", "--configure", f"--mtu={_MTU}", f"--ready-fd={told}", str(holder.pid), "tap0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[told],
        )
        os.close(told)
        told = -1
        if not os.read(ready, 1):
            raise PeerError("slirp4netns has ended before it was ready")
        yield ["nsenter", f"--net=/proc/{holder.pid}/ns/net", "--"]
    finally:
        for fd in (ready, told):
            if fd >= 0:
                os.close(fd)
        for process in (slirp, holder):
            if process is not None:
                end_process(process)
