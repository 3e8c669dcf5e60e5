"""A runtime that is closed in the midst of everything."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import HutchError, RuntimeClosedError
from hutch.runtime.runtime import LocalRuntime
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import in_time, sh

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from hutch.runtime.box import LocalBox

pytestmark = [pytest.mark.root, pytest.mark.anyio]

ENDLESS = sh("while :; do echo x; done")


async def test_whatever_comes_after_the_close_is_told_so(home: Path) -> None:
    async with LocalRuntime(home) as runtime:
        box = await runtime.create(IMAGE)
        await box.start()
    for call in (
        lambda: box.run("true"),
        box.info,
        box.start,
        box.stop,
        box.stats,
        box.executions,
        lambda: box.snapshots.create("s"),
        lambda: box.files.read("/etc/passwd"),
        runtime.volumes.list,
        runtime.list,
    ):
        with pytest.raises(RuntimeClosedError):
            await call()


async def test_every_waiter_learns_that_the_runtime_was_closed(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(2 << 30)  # seconds to copy: it cannot be done before the close
    ends: dict[str, BaseException | None] = {}

    async def record(name: str, call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
            ends[name] = None
        except Exception as error:
            ends[name] = error

    async def iterate(box: LocalBox) -> None:
        async for _ in (await box.exec(*ENDLESS)).stdout:
            await anyio.sleep(0.001)

    async def follow(box: LocalBox) -> None:
        async for _ in box.logs(follow=True):
            pass

    async def feed(box: LocalBox) -> None:
        await (await box.exec("sleep", "100", stdin=True)).stdin.write(b"x" * (4 << 20))

    with in_time(20):
        async with anyio.create_task_group() as tasks, LocalRuntime(home) as runtime:
            box = await runtime.create(IMAGE)
            await box.start()
            job = await runtime.create(IMAGE, command=sh("while :; do echo x; sleep 0.01; done"), detach=True)
            await job.start()
            calls: dict[str, Callable[[], Awaitable[object]]] = {
                "run": lambda: box.run("sleep", "100"),
                "iterate": lambda: iterate(box),
                "feed": lambda: feed(box),
                "put": lambda: box.files.put(source, "/dev/shm/x"),
                "follow": lambda: follow(job),
                "wait": job.wait,
            }
            for name, call in calls.items():
                tasks.start_soon(record, name, call)
            await anyio.sleep(0.2)
            with in_time(8):
                await runtime.close()
    strangers = {
        name: error for name, error in ends.items() if name != "put" and not isinstance(error, RuntimeClosedError)
    }
    assert not strangers
    assert isinstance(ends["put"], HutchError)
    async with LocalRuntime(home) as runtime:
        await runtime.remove(job.id, force=True)


async def test_boxes_that_go_with_their_runtime_go_even_if_they_never_ran(home: Path) -> None:
    async with LocalRuntime(home) as runtime:
        await runtime.create(IMAGE, auto_remove=True)
        kept = await runtime.create(IMAGE, auto_remove=True, detach=True)
    async with LocalRuntime(home) as runtime:
        assert [info.id for info in await runtime.list()] == [kept.id]
        await runtime.remove(kept.id)
    assert os.listdir(home / "boxes") == []
