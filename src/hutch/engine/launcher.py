"""The host's half of every start: the handshake with a launcher mode of ``box-agent`` (agent/launch.c, agent/vm.c)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from hutch.errors import EngineError, InvalidArgumentError
from hutch.host.proc import Process, ended

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hutch.engine.base import BoxPlan

GIVE_UP_SECONDS = 10.0
MFD_EXEC = 0x10
"""Linux 6.3: says that the file is meant to be run; older kernels refuse the flag."""
BOX_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,63}")
HOSTNAME = re.compile(r"[0-9A-Za-z_]([0-9A-Za-z_.-]{0,62}[0-9A-Za-z_])?")


class BoxFault(EngineError):
    """The image or the disk of the box is at fault, not what it is started with."""


def check_plan(plan: BoxPlan) -> None:
    """Raise `InvalidArgumentError` for a plan that no engine can carry out."""
    if not BOX_ID.fullmatch(plan.box_id):
        raise InvalidArgumentError(f"malformed box id {plan.box_id!r}")
    if not HOSTNAME.fullmatch(plan.hostname):
        raise InvalidArgumentError(
            f"malformed host name {plan.hostname!r}: letters, digits, '-', '_' and '.', at most 64"
        )
    if not plan.lowers:
        raise InvalidArgumentError("a box needs at least one layer")
    for mount in plan.mounts:
        target = Path(mount.target)
        if not target.is_absolute() or ".." in target.parts or len(target.parts) < 2:
            raise InvalidArgumentError(
                f"malformed mount target {mount.target!r}: an absolute path below / without '..'"
            )


def hosts_file(hostname: str) -> str:
    """Return the contents of a box's /etc/hosts."""
    return f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 {hostname}\n"


def resolver_file(nameserver: str) -> str:
    """Return the contents of a box's /etc/resolv.conf."""
    return f"nameserver {nameserver}\n" if nameserver else ""


def open_logs(directory: Path) -> list[int]:
    """Open the main log's two files and the exit record; the caller closes them."""
    opened: list[int] = []
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        for name, extra in (("main.log.0", 0), ("main.log.1", 0), ("exit", os.O_TRUNC)):
            opened.append(os.open(directory / name, flags | extra, 0o600))
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    return opened


def encode(records: Iterable[tuple[str, str]]) -> bytes:
    """Return records in the launcher's form. Raises `InvalidArgumentError` for values that it cannot carry."""
    parts = []
    for key, value in records:
        if "\0" in value:
            raise InvalidArgumentError(f"{key} contains a NUL character: {value!r}")
        parts.append(os.fsencode(f"{key}={value}") + b"\0")
    return b"".join(parts)


@functools.cache
def sealed_agent(path: Path) -> int:
    """Return a descriptor of an unchangeable copy of the agent program, made once a process and kept open.

    Boxes run it in place of the file: as an ordinary user the box's root owns the file, and could overwrite it through
    /proc/PID/exe (the way of CVE-2019-5736).
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("box-agent", flags | MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise EngineError(f"cannot make an executable copy of {path}: {error.strerror}") from error
        fd = os.memfd_create("box-agent", flags)
    with open(fd, "wb", buffering=0, closefd=False) as copy:
        copy.write(path.read_bytes())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


class Launch:
    """One run of the launcher: `hand_over`, `until` the box is complete, `commit`, and `close` in any case (without the
    commit it ends the box)."""

    def __init__(self, agent: Path, mode: str, arguments: Sequence[str] = ()) -> None:
        """Start the launcher. Raises `EngineError`."""
        self._pid: int | None = None
        self._pidfd: int | None = None
        self._committed = False
        program = sealed_agent(agent)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        try:
            self._launcher = os.posix_spawn(
                f"/proc/self/fd/{program}",
                ["box-agent", mode, *arguments],
                {"PATH": os.environ.get("PATH", os.defpath)},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)],
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ),
            )
        except OSError as error:
            self._control.close()
            raise EngineError(f"cannot run the agent program {agent}: {error.strerror}") from error
        finally:
            theirs.close()

    def hand_over(self, configuration: bytes, descriptors: Sequence[int]) -> None:
        """Give the launcher its configuration, with the descriptors. Raises `EngineError`."""
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(configuration))
        try:
            socket.send_fds(self._control, [configuration], descriptors)
        except OSError as error:
            raise EngineError(f"cannot hand the configuration to the launcher: {error.strerror}") from error

    def send(self, message: bytes) -> None:
        """Tell the launcher something more. Raises `EngineError`."""
        try:
            self._control.send(message)
        except OSError as error:
            raise EngineError(f"the box cannot start: its launcher ended ({error.strerror})") from error

    async def until(self, sign: bytes) -> Process:
        """Wait for the launcher's message and return the box's PID 1. Raises `EngineError` with the launcher's
        words."""
        while not (text := await self._message()).startswith(sign):
            if text.startswith(b"P"):  # the launcher's word, which comes first, is the only one that counts
                self._pid = self._pid or int(text[1:])
            elif text.startswith((b"E", b"F")):
                kind = EngineError if text.startswith(b"E") else BoxFault
                raise kind(f"the box cannot start: {text[1:].decode(errors='replace')}")
            elif not text:
                raise EngineError("the box cannot start: the launcher ended without a word")
        process = None if self._pid is None else Process.of(self._pid)
        if process is None:
            raise EngineError("the box cannot start: its first process ended at once")
        return process

    async def commit(self) -> None:
        """Let the box run: from now on it outlives this process. Returns when its agent accepts connections, or has
        ended."""
        self._committed = True
        with contextlib.suppress(OSError):
            self._control.send(b"G")
        while await self._message():
            pass

    async def _message(self) -> bytes:
        """Return the next message; empty at the end."""
        await anyio.lowlevel.checkpoint()  # one that never stops talking may not keep everybody else from running
        while True:
            try:
                text, descriptors, _, _ = socket.recv_fds(self._control, 2048, 1)
            except BlockingIOError:
                await anyio.wait_readable(self._control)
                continue
            except OSError:
                return b""
            for fd in descriptors:
                if self._pidfd is None:
                    self._pidfd = fd
                else:
                    os.close(fd)
            return text

    async def close(self) -> None:
        """Reap the launcher. Without the commit, end the box and wait for that. Cancel-safe when shielded."""
        self._control.close()  # PID 1 ends when it sees that before the commit
        if not self._committed:
            os.kill(self._launcher, signal.SIGKILL)  # ours and not reaped, so the pid is its
            if self._pidfd is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        if self._pidfd is not None:
            if not self._committed:
                await ended(self._pidfd, GIVE_UP_SECONDS)
            os.close(self._pidfd)
        launcher = os.pidfd_open(self._launcher)
        await ended(launcher, GIVE_UP_SECONDS)
        os.close(launcher)
        os.waitpid(self._launcher, os.WNOHANG)  # noqa: ASYNC222 - it has ended, and this does not wait
