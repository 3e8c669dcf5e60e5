"""A box whose first process stands still: whoever calls is told in time, and the box can be taken away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import UpstreamUnavailableError
from hutch.runtime import channel, execution
from hutch.types import BoxState
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import Sink, in_time, sh, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime

pytestmark = [pytest.mark.root, pytest.mark.anyio]


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(execution, "_SILENCE", 0.3)


async def halt(box: LocalBox) -> None:
    pid = (await box.info()).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)


async def test_a_command_under_way_ends_with_an_error(box: LocalBox) -> None:
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            with pytest.raises(UpstreamUnavailableError), in_time(5):
                await box.run("sleep", "1", timeout=2)

        tasks.start_soon(run)
        await anyio.sleep(0.2)
        await halt(box)


@pytest.mark.parametrize("direction", ["get", "put"])
async def test_a_copy_under_way_ends_with_an_error(box: LocalBox, tmp_path: Path, direction: str) -> None:
    await box.run(*sh("dd if=/dev/zero of=/root/big bs=1M count=300"))
    with (tmp_path / "big").open("wb") as file:
        file.truncate(4000 << 20)
    async with anyio.create_task_group() as tasks:

        async def copy() -> None:
            with pytest.raises(UpstreamUnavailableError), in_time(8):
                if direction == "get":
                    await box.files.get("/root/big", tmp_path / "copy")
                else:
                    await box.files.put(tmp_path / "big", "/root/copy")

        tasks.start_soon(copy)
        if direction == "get":
            await until(lambda: any(name.startswith(".hutch-") for name in os.listdir(tmp_path)))
        else:
            await anyio.sleep(0.1)
        await halt(box)


async def test_a_frozen_box_is_not_a_dead_one(box: LocalBox, runtime: LocalRuntime) -> None:
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            with in_time(10):
                assert (await box.run("sleep", "1")).ok

        tasks.start_soon(run)
        await anyio.sleep(0.2)
        async with runtime.records.holding_still(box.id):
            await anyio.sleep(2.5)


async def test_stop_takes_no_longer_than_the_grace_and_its_margin(box: LocalBox) -> None:
    await halt(box)
    began = time.monotonic()
    with in_time(10):
        await box.stop(timeout=1)
    assert time.monotonic() - began < 4.5


async def test_remove_does_not_ask(box: LocalBox) -> None:
    await halt(box)
    with in_time(3):
        await box.remove(force=True)


@contextlib.contextmanager
def busy(box: LocalBox) -> Iterator[None]:
    """The event loop does not come to read from the agent, as under heavy load."""
    channel = box._channels.find(box.id)
    assert channel is not None
    loop = asyncio.get_running_loop()
    loop.remove_reader(channel._socket)
    yield
    if not channel.closed:
        loop.add_reader(channel._socket, channel._on_readable)


@pytest.mark.parametrize("first", ["info", "stdin"])
async def test_what_a_box_said_before_its_end_is_read_when_its_end_is_seen_first(
    runtime: LocalRuntime, first: str
) -> None:
    job = await runtime.create(IMAGE, command=sh("echo ready; read x; seq 1 5000; exit 7"), open_stdin=True)
    sink = Sink()
    execution = await job.start_attached(stdout=sink)
    directory = runtime.home.box(job.id)
    await until(lambda: bytes(sink.data) == b"ready\n")
    with busy(job):
        await execution.stdin.write(b"go\n")
        await until(lambda: not runtime.engines.container.observe(directory).running)
        if first == "info":
            assert (await job.info()).state is BoxState.STOPPED
        else:
            await execution.stdin.write(b"nobody hears it\n")
    with in_time():
        result = await execution.wait()
    assert (result.exit_code, result.truncated) == (7, False)
    assert bytes(sink.data) == b"ready\n" + b"".join(b"%d\n" % n for n in range(1, 5001))
