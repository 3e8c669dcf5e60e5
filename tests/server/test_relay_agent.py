"""The relay's connection to an agent that may be anything: what it passes as shared memory is checked."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.core import agentproto as proto
from hutch.core.frames import Decoder, FrameError, encode
from hutch.core.relay import OWN_REQUESTS, Downward
from hutch.errors import UpstreamUnavailableError
from hutch.server.relay_agent import AgentSocket
from tests.runtime.helpers import in_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio

ME, NEXT = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
WINDOW = 64 * 1024
BUSY = 1 << 20
SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Agent:
    """The other side, and the gate through which the relay lets what it says."""

    def __init__(self, sock: socket.socket, relay: AgentSocket) -> None:
        self.sock = sock
        self.relay = relay
        self.gate = Downward(ME, shared=relay)
        self.out = Decoder()
        self.position = 0

    def data(self, size: int, exec_id: str = ME) -> bytes:
        """So much output, in frames."""
        words = b""
        for _ in range(size // (128 * 1024)):
            payload = struct.pack("<Q", self.position) + bytes(128 * 1024)
            words += encode(proto.Reply.DATA, payload, stream=1, exec_id=exec_id)
            self.position += 128 * 1024
        return words

    async def said(self, words: bytes, fds: tuple[int, ...] = ()) -> bytes:
        """Say so, and return the output that the watcher gets."""
        got = b""

        async def hear() -> None:
            nonlocal got
            left = len(words)
            while left > 0:
                data = await self.relay.read()
                left -= len(data)
                for message in self.gate.feed(data):
                    for frame in self.out.receive(message):
                        event = proto.decode_event(frame)
                        assert isinstance(event, proto.Data)
                        got += bytes(event.data)

        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self.sock.sendmsg([words[:1]], passed)
        with in_time():
            await asyncio.gather(hear(), asyncio.to_thread(self.sock.sendall, words[sent:]))
        return got

    async def asked(self, exec_id: str = ME) -> int:
        """Make the relay ask for the window; return the number of its request."""
        await self.said(self.data(BUSY, exec_id))
        with in_time():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.relay.read)  # the request goes before the next read
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
        (frame,) = Decoder().receive(self.sock.recv(4096))
        assert (frame.type, frame.stream, frame.exec_id) == (proto.Request.SHM, 1, exec_id)
        assert frame.req in OWN_REQUESTS
        return frame.req


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    """An agent that has been greeted."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(10)
    with theirs, AgentSocket(ours, ME) as relay:
        theirs.sendall(encode(proto.Reply.HELLO_OK, struct.pack("<IIII", 1, WINDOW, 1, 0), req=1))
        with in_time():
            await relay.greet()
        assert theirs.recv(4096) == proto.hello(1)
        yield Agent(theirs, relay)


def memory(content: bytes, seals: int = SEALED) -> int:
    """A memory file."""
    fd = os.memfd_create("window", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def answer(number: int, size: int = WINDOW) -> bytes:
    """SHM_OK."""
    return encode(proto.Reply.SHM_OK, struct.pack("<I", size), stream=1, req=number, exec_id=ME)


def shared(position: int, length: int, exec_id: str = ME, stream: int = 1) -> bytes:
    """RANGE."""
    return encode(proto.Reply.RANGE, struct.pack("<QI", position, length), stream=stream, exec_id=exec_id)


def descriptors() -> set[str]:
    """The descriptors of this process."""
    return set(os.listdir("/proc/self/fd"))


async def test_a_busy_stream_is_read_from_the_window(agent: Agent) -> None:
    content = os.urandom(WINDOW)
    before = descriptors()
    number = await agent.asked()
    fd = memory(content)
    with os.fdopen(fd):
        assert await agent.said(answer(number), (fd,)) == b""
    assert (
        await agent.said(shared(BUSY, 100) + shared(BUSY + 100, WINDOW - 50))
        == content[:100] + content[100:] + (content[:50])
    )
    assert len(descriptors()) <= len(before) + 1  # the map's own
    agent.relay.turn(NEXT)
    assert len(descriptors()) <= len(before)


async def test_a_refusal_leaves_the_bytes_in_frames_and_is_not_repeated(agent: Agent) -> None:
    number = await agent.asked()
    refused = encode(proto.Reply.FAILED, struct.pack("<HH", 7, 0) + b"no", req=number, exec_id=ME)
    assert await agent.said(refused) == b""
    assert len(await agent.said(agent.data(BUSY))) == BUSY
    agent.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        agent.sock.recv(1)


async def test_each_execution_on_a_line_has_windows_of_its_own(agent: Agent) -> None:
    number = await agent.asked()
    agent.relay.turn(NEXT)
    agent.gate.turn(NEXT)
    agent.position = 0
    before = descriptors()
    with os.fdopen(memory(bytes(WINDOW))) as file:
        assert await agent.said(answer(number), (file.fileno(),)) == b""  # too late: closed again
    assert descriptors() <= before
    with pytest.raises(FrameError):
        await agent.said(shared(0, 10, NEXT))
    await agent.asked(NEXT)


@pytest.mark.parametrize("content, seals", [(WINDOW, fcntl.F_SEAL_GROW), (WINDOW, 0), (WINDOW - 1, SEALED)])
async def test_a_descriptor_that_is_not_a_sealed_window_is_refused(agent: Agent, content: int, seals: int) -> None:
    number = await agent.asked()
    before = descriptors()
    with os.fdopen(memory(bytes(content), seals)) as file, pytest.raises(FrameError):
        await agent.said(answer(number), (file.fileno(),))
    assert descriptors() <= before


async def test_a_window_of_another_size_than_was_told_is_refused(agent: Agent) -> None:
    number = await agent.asked()
    before = descriptors()
    with os.fdopen(memory(bytes(2 * WINDOW))) as file, pytest.raises(FrameError):
        await agent.said(answer(number, 2 * WINDOW), (file.fileno(),))
    assert descriptors() <= before


async def test_a_pipe_is_no_window(agent: Agent) -> None:
    number = await agent.asked()
    read, write = os.pipe()
    with os.fdopen(read), os.fdopen(write, "w"), pytest.raises(FrameError):
        await agent.said(answer(number), (read,))


async def test_a_promise_without_a_descriptor_is_refused(agent: Agent) -> None:
    number = await agent.asked()
    with pytest.raises(FrameError):
        await agent.said(answer(number))


@pytest.mark.parametrize("number", [OWN_REQUESTS[7], OWN_REQUESTS[-1]])
async def test_an_answer_to_nothing_is_refused(agent: Agent, number: int) -> None:
    with pytest.raises(FrameError):
        await agent.said(answer(number))


async def test_descriptors_do_not_pile_up(agent: Agent) -> None:
    await agent.asked()
    before = descriptors()
    words = encode(proto.Reply.STDIN_CLOSED, exec_id=ME)
    with os.fdopen(memory(b"")) as file, pytest.raises(FrameError):
        await agent.said(words, (file.fileno(),) * 10)
    agent.relay.__exit__()
    assert len(descriptors()) < len(before)


@pytest.mark.parametrize(
    "words", [shared(BUSY, WINDOW + 1), shared(BUSY, 10, stream=2), shared(BUSY, 10, stream=0), shared(2**64 - 5, 10)]
)
async def test_output_that_is_not_in_the_window_is_refused(agent: Agent, words: bytes) -> None:
    number = await agent.asked()
    with os.fdopen(memory(bytes(WINDOW))) as file:
        await agent.said(answer(number), (file.fileno(),))
    with pytest.raises(FrameError):
        await agent.said(words)


async def test_an_agent_without_shared_memory_is_not_asked() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(10)
    with theirs, AgentSocket(ours, ME) as relay:
        theirs.sendall(encode(proto.Reply.HELLO_OK, struct.pack("<IIII", 1, WINDOW, 0, 0), req=1))
        with in_time():
            await relay.greet()
        agent = Agent(theirs, relay)
        assert len(await agent.said(agent.data(2 * BUSY))) == 2 * BUSY
        assert theirs.recv(4096) == proto.hello(1)


async def test_an_agent_that_says_nothing_or_something_else_is_reported() -> None:
    for words in (b"", encode(proto.Reply.OK, b"", req=1)):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs, AgentSocket(ours, ME) as relay, in_time():
            theirs.sendall(words)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(UpstreamUnavailableError):
                await relay.greet()
