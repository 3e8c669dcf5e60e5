"""The agent as an ordinary process, and small helpers of its tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .client import Client, Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BINARY = Path(os.environ.get("HUTCH_TEST_AGENT") or Path(__file__).parents[2] / "src/hutch/_bin/box-agent")


@dataclass
class Agent:
    """A running agent (not PID 1)."""

    process: subprocess.Popen[bytes]
    path: Path
    directory: Path

    def client(self, patience: float = 10.0) -> Client:
        return Client(self.path, patience)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def log(self) -> list[tuple[int, bytes, int]]:
        """The main log's records, oldest file first: position, bytes, stream."""
        records: list[tuple[int, int, bytes, int]] = []
        for name in ("main.log.0", "main.log.1"):
            data, at = (self.directory / name).read_bytes(), 0
            while at < len(data):
                when, position, length, stream = struct.unpack_from("<QQIB3x", data, at)
                assert len(data) - at - 24 >= length, "a record is cut"
                records.append((when, position, data[at + 24 : at + 24 + length], stream))
                at += 24 + length
        return [(position, data, stream) for _, position, data, stream in sorted(records, key=lambda r: r[:2])]


@contextlib.contextmanager
def running_agent(*, hold_ms: int = 10_000, prefix: Sequence[str] = ()) -> Iterator[Agent]:
    """An agent in a new directory under /tmp; everything it started is ended at the end.

    ``prefix`` is a command that executes the agent.
    """
    with tempfile.TemporaryDirectory(prefix="hutch-agent-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        path = directory / "agent.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(128)
            flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
            files = [os.open(directory / f, flags, 0o600) for f in ("main.log.0", "main.log.1", "exit")]
            arguments = [
                *prefix,
                str(BINARY),
                "agent",
                "--listen-fd",
                str(listener.fileno()),
                "--hold-ms",
                str(hold_ms),
            ]
            arguments += ["--log-fds", f"{files[0]},{files[1]}", "--exit-fd", str(files[2])]
            process = subprocess.Popen(arguments, pass_fds=[listener.fileno(), *files])
            for fd in files:
                os.close(fd)
        try:
            yield Agent(process, path, directory)
        finally:
            if process.poll() is None:
                with contextlib.suppress(OSError, EOFError, TimeoutError), Client(path, 5.0) as client:
                    client.poweroff()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            if process.poll() is None:
                process.kill()
                process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Poll for what has no event of its own, such as a file that a command writes."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    """Whether no process has this id."""
    try:
        os.kill(pid, signal.SIG_DFL)
    except ProcessLookupError:
        return True
    return False


def counter(size: int) -> str:
    """Shell words that write `size` bytes without two equal lines; `expected` is what they write."""
    return f"seq -f %015.0f 0 {size // 16 - 1}"


def expected(size: int) -> bytes:
    return b"".join(b"%015d\n" % i for i in range(size // 16))


def records(client: Client) -> dict[str, tuple[int, ...]]:
    """LIST: id -> state, flags, pid, status, start, end."""
    reply = client.request(Kind.LIST)
    assert reply.type == Kind.EXECS and len(reply.payload) % 40 == 0
    rows = struct.iter_unpack("<12sBBHIiQQ", reply.payload)
    return {row[0].rstrip(b"\0").decode(): (row[1], row[2], *row[4:]) for row in rows}
