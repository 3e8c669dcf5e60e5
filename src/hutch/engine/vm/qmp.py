"""QEMU's machine protocol (QEMU's docs/interop/qmp-spec.txt), as far as it is needed: commands one after the other."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import msgspec

from hutch.engine import record
from hutch.errors import EngineError, UpstreamUnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SOCKET = "qmp.sock"
SECONDS = 10.0
_POLL, _POLL_MOST = 0.002, 0.02


class Monitor:
    """A connection to one emulator. Everything that comes is untrusted."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._data = b""
        # Go with the next bytes.
        self._descriptors: list[int] = []

    async def command(self, name: str, /, **arguments: Any) -> Any:
        """Carry out a command and return its result. Raises `EngineError`."""
        request = {"execute": name, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        await self._send(msgspec.json.encode(request) + b"\n")
        while True:
            answer = await self._receive()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise EngineError(f"the emulator refused {name}: {str(answer['error'])[:300]}")

    async def running(self) -> bool:
        """Whether the guest's processors run. Raises `EngineError`."""
        answer = await self.command("query-status")
        return isinstance(answer, dict) and answer.get("running") is True

    async def give(self, name: str, fd: int) -> None:
        """Hand over a descriptor, which commands can then name. Raises `EngineError`."""
        self._descriptors = [fd]
        await self.command("getfd", fdname=name)

    async def move(self, command: str, state: int) -> None:
        """Save the machine's state to a file (``migrate``), or load it (``migrate-incoming``). Memory that is shared
        with a file is in there already. Raises `EngineError`."""
        capability = {"capability": "x-ignore-shared", "state": True}
        await self.command("migrate-set-capabilities", capabilities=[capability])
        await self.command("migrate-set-parameters", max_bandwidth=1 << 40)
        await self.give("state", state)
        await self.command(command, uri="fd:state")
        await self._moved()

    async def _moved(self) -> None:
        pause = _POLL
        while True:
            answer = await self.command("query-migrate")
            status = answer.get("status") if isinstance(answer, dict) else None
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                raise EngineError(
                    f"the emulator could not move the machine's state: {answer.get('error-desc', status)}"
                )
            await anyio.sleep(pause)
            pause = min(1.2 * pause, _POLL_MOST)

    async def _send(self, data: bytes) -> None:
        while data:
            try:
                data = data[socket.send_fds(self._socket, [data], self._descriptors) :]
                self._descriptors = []
            except BlockingIOError:
                await anyio.wait_writable(self._socket)
            except OSError as error:
                raise EngineError(f"the emulator has closed its monitor: {error.strerror}") from error

    async def _receive(self) -> dict[str, Any]:
        await anyio.lowlevel.checkpoint()  # one that never stops talking may not keep everybody else from running
        while b"\n" not in self._data:
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                await anyio.wait_readable(self._socket)
                continue
            except OSError as error:
                raise EngineError(f"the emulator has closed its monitor: {error.strerror}") from error
            if not data or len(self._data) > 1 << 20:
                raise EngineError("the emulator has closed its monitor")
            self._data += data
        line, _, self._data = self._data.partition(b"\n")
        try:
            return msgspec.json.decode(line, type=dict[str, Any])
        except (ValueError, RecursionError) as error:
            raise EngineError(f"the emulator does not speak its protocol: {error}") from error

    async def greet(self) -> None:
        """Take the greeting, and leave the phase in which only capabilities can be agreed on."""
        await self._receive()
        await self.command("qmp_capabilities")


@contextlib.asynccontextmanager
async def monitor(directory: Path, *, seconds: float = SECONDS) -> AsyncIterator[Monitor]:
    """Connect to the emulator of a box; the block may take ``seconds``. One connection is served at a time.

    Raises `UpstreamUnavailableError`, `EngineError`.
    """
    try:
        with anyio.fail_after(seconds):
            while True:
                try:
                    connection = record.connect(directory, SOCKET)
                    break
                except BlockingIOError:
                    await anyio.sleep(_POLL)
            with connection:
                opened = Monitor(connection)
                await opened.greet()
                yield opened
    except TimeoutError:
        raise UpstreamUnavailableError(
            f"the emulator of the box in {directory} does not answer within {seconds:g} s"
        ) from None
