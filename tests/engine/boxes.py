"""Boxes under test: start one, run commands in it over the agent protocol with a plain blocking client."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hutch.core import agentproto, frames
from hutch.engine.base import BoxPlan, Lower, MountPlan, Started
from hutch.types import Limits

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Iterator, Sequence

    from hutch.engine.base import Engine

ENVIRONMENT = {"PATH": "/bin:/usr/bin:/sbin:/usr/sbin", "HOME": "/root"}
_numbers = itertools.count()


class Output(NamedTuple):
    """How a command in a box ended and what it wrote."""

    status: int
    out: str
    err: str


class Box(NamedTuple):
    """A running box."""

    directory: Path
    plan: BoxPlan
    started: Started
    engine: Engine

    async def run(self, *argv: str, user: str = "", timeout: float = 20.0) -> Output:
        """Run a command to its end."""
        with await self.engine.connect(self.directory) as connection:
            connection.settimeout(timeout)
            return _execute(connection, argv, user, time.monotonic() + timeout)

    async def sh(self, script: str, *, user: str = "", timeout: float = 20.0) -> Output:
        """Run a shell script to its end."""
        return await self.run("sh", "-c", script, user=user, timeout=timeout)

    async def spawn(self, script: str) -> None:
        """Start a shell script and leave it running."""
        with await self.engine.connect(self.directory) as connection:
            connection.settimeout(10)
            connection.sendall(agentproto.start(_new_id(), ["sh", "-c", script], req=1, env=ENVIRONMENT))
            answer = agentproto.decode_answer(next(received(connection)))
            assert isinstance(answer, agentproto.Started), answer


def _new_id() -> str:
    return f"t{os.getpid():x}x{next(_numbers):x}"[:12]


def received(connection: socket.socket) -> Iterator[frames.Frame]:
    """Yield the frames that the agent sends, until it closes the connection."""
    decoder = frames.Decoder()
    while data := connection.recv(1 << 16):
        yield from decoder.receive(data)


def _execute(connection: socket.socket, argv: Sequence[str], user: str, deadline: float) -> Output:
    name = _new_id()
    written = {1: b"", 2: b""}
    open_streams = {1, 2}
    status: int | None = None
    connection.sendall(agentproto.start(name, argv, req=1, env=ENVIRONMENT, user=user, watch=True))
    for frame in received(connection):
        assert time.monotonic() < deadline
        answer = agentproto.decode_answer(frame)
        if isinstance(answer, agentproto.Failed):
            raise AssertionError(f"{argv}: {answer.message}")
        if answer is not None:
            continue
        match agentproto.decode_event(frame):
            case agentproto.Data(stream, position, data):
                written[stream] += data
                connection.sendall(agentproto.ack(name, stream, position + len(data)))
            case agentproto.Eof(stream):
                open_streams.discard(stream)
            case agentproto.Exited(status):
                pass
        if status is not None and not open_streams:
            return Output(status, written[1].decode(errors="replace"), written[2].decode(errors="replace"))
    raise AssertionError(f"{argv}: the agent closed the connection")


def plan(
    directory: Path,
    rootfs: Path,
    *,
    limits: Limits | None = None,
    mounts: Sequence[MountPlan] = (),
    lowers: Sequence[Lower] = (),
) -> BoxPlan:
    """Return a plan for a box in a new folder."""
    directory.mkdir(exist_ok=True)
    return BoxPlan(
        box_id=f"test-{os.getpid()}-{next(_numbers)}",
        directory=directory,
        lowers=(*lowers, Lower(rootfs)),
        hostname="testbox",
        limits=limits or Limits(),
        mounts=tuple(mounts),
    )


@contextlib.asynccontextmanager
async def running(engine: Engine, box: BoxPlan) -> AsyncIterator[Box]:
    """A box that runs inside the block."""
    started = await engine.start(box)
    try:
        yield Box(box.directory, box, started, engine)
    finally:
        await engine.kill(box.directory)


def emulator(box: Box) -> int:
    """The pid of a VM's emulator: the keeper's only child."""
    children = Path(f"/proc/{box.started.pid}/task/{box.started.pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])
