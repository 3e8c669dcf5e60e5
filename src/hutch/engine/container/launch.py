"""The host's half of a start: the configuration for ``box-agent launch`` and the handshake with it (agent/launch.c)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import signal
import socket
from typing import TYPE_CHECKING

import anyio

from hutch.engine.container import upper
from hutch.errors import EngineError, InvalidArgumentError
from hutch.host.proc import Process, ended

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from hutch.engine.base import BoxPlan
    from hutch.host.mapping import Mapping

GIVE_UP_SECONDS = 10.0
MFD_EXEC = 0x10
"""Linux 6.3: says that the file is meant to be run; older kernels refuse the flag."""


def configuration(plan: BoxPlan, mapping: Mapping, doors: Iterable[str], *, pids: int | None) -> bytes:
    """Return the launcher's configuration. ``doors``: control group files; ``pids``: a limit that no group enforces.

    Raises `InvalidArgumentError` for values that it cannot carry.
    """
    records: list[tuple[str, str]] = [
        ("hostname", plan.hostname),
        ("hosts", f"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 {plan.hostname}\n"),
        ("resolv", f"nameserver {plan.nameserver}\n" if plan.nameserver else ""),
        ("stage", str(plan.directory / "run")),
        *upper.configuration(plan.directory),
        ("uid_map", mapping.uid_map),
        ("gid_map", mapping.gid_map),
        ("rootless", str(int(mapping.rootless))),
        ("all_ids", str(int(not mapping.single))),
    ]
    if pids is not None:
        records.append(("pids", str(pids)))
    for lower in plan.lowers:
        shift = not lower.owned_by_box and not mapping.rootless
        records.append(("lower_shift" if shift else "lower", str(lower.path)))
    for mount in plan.mounts:
        records.append(("bind_ro" if mount.read_only else "bind_rw", str(mount.source)))
        records.append(("target", mount.target))
    records += [("cgroup", door) for door in doors]
    for key, value in records:
        if "\0" in value:
            raise InvalidArgumentError(f"{key} contains a NUL character: {value!r}")
    return b"".join(os.fsencode(f"{key}={value}") + b"\0" for key, value in records)


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
    """One run of the launcher: `prepare`, `commit`, and `close` in any case (without the commit it ends the box)."""

    def __init__(self, agent: Path, mapping: Mapping) -> None:
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
                ["box-agent", "launch", *(mapping.outer or ())],
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

    async def prepare(self, configuration: bytes, descriptors: Sequence[int]) -> Process:
        """Hand over the configuration and return the box's PID 1, complete but for the commit.

        Raises `EngineError` with the launcher's words.
        """
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(configuration))
        try:
            socket.send_fds(self._control, [configuration], descriptors)
        except OSError as error:
            raise EngineError(f"cannot hand the configuration to the launcher: {error.strerror}") from error
        while not (text := await self._message()).startswith(b"R"):
            if text.startswith(b"P"):
                self._pid = int(text[1:])
            elif text.startswith(b"E"):
                raise EngineError(f"the box cannot start: {text[1:].decode(errors='replace')}")
            else:
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
        while True:
            try:
                text, descriptors, _, _ = socket.recv_fds(self._control, 2048, 1)
            except BlockingIOError:
                await anyio.wait_readable(self._control)
                continue
            except OSError:
                return b""
            if descriptors:
                self._pidfd = descriptors[0]
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
