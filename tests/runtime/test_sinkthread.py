"""The thread that calls a blocking sink."""

from __future__ import annotations

import asyncio
import contextvars
import io
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from hutch.runtime import sinkthread
from hutch.runtime.sinkthread import SinkThread
from tests.runtime.helpers import BlockingSink, in_time, sh, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hutch.runtime.box import LocalBox

pytestmark = pytest.mark.anyio

MIB = 1 << 20


def threads() -> set[threading.Thread]:
    """The threads of sinks."""
    return {thread for thread in threading.enumerate() if thread.name == "hutch-sink"}


@pytest.fixture
def thread() -> Iterator[SinkThread]:
    """One that is closed afterwards."""
    thread = SinkThread()
    yield thread
    thread.close()


def fail(error: BaseException) -> None:
    """Raise."""
    raise error


async def test_calls_are_made_in_one_thread_and_in_the_context_of_the_caller(thread: SinkThread) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("set")
    before = threads()
    with in_time():
        idents = {await thread.call(threading.get_ident) for _ in range(10)}
        assert await thread.call(variable.get) == "set"
    assert len(idents) == 1 and idents != {threading.get_ident()}
    assert len(threads() - before) == 1
    thread.close()
    thread.close()
    await until(lambda: threads() <= before)  # those of the test before may be ending
    with in_time():
        assert await thread.call(len, b"abc") == 3


@pytest.mark.parametrize("error", [ValueError("no"), KeyError("no"), StopAsyncIteration()])
async def test_what_the_sink_raises_is_raised(thread: SinkThread, error: BaseException) -> None:
    with in_time():
        with pytest.raises(type(error)) as raised:
            await thread.call(fail, error)
        assert raised.value is error
        assert await thread.call(len, b"abc") == 3


async def test_what_no_coroutine_may_raise_is_the_cause(thread: SinkThread) -> None:
    with in_time(), pytest.raises(RuntimeError, match="StopIteration") as raised:
        await thread.call(next, iter(()))
    assert isinstance(raised.value.__cause__, StopIteration)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_an_order_to_exit_reaches_the_caller(error: BaseException) -> None:
    async def call() -> None:
        thread = SinkThread()
        try:
            await asyncio.wait_for(thread.call(fail, error), 10)
        finally:
            thread.close()

    with pytest.raises(type(error)):
        asyncio.run(call())


async def test_a_cancelled_call_is_abandoned_and_one_that_has_not_begun_is_not_made(thread: SinkThread) -> None:
    calls: list[str] = []
    begun, release = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        release.wait(10)

    try:
        with in_time():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(thread.call, block)
                await until(begun.is_set)
                tasks.start_soon(thread.call, calls.append, "second")
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            release.set()
            await thread.call(calls.append, "third")
    finally:
        release.set()
    assert calls == ["third"]


async def test_an_idle_thread_is_given_up(thread: SinkThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinkthread, "_IDLE", 0.05)
    before = threads()
    with in_time():
        for _ in range(3):
            assert await thread.call(len, b"abc") == 3
            await until(lambda: threads() <= before)  # those of the test before may be ending


def test_a_loop_that_is_closed_while_the_sink_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    crashed: list[object] = []
    release, before = threading.Event(), threads()
    monkeypatch.setattr(threading, "excepthook", crashed.append)

    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(SinkThread().call(release.wait, 10), 0.05)

    asyncio.run(leave())
    (left,) = threads() - before
    release.set()
    left.join(10)
    assert not left.is_alive() and not crashed


def test_a_blocked_sink_does_not_hold_up_the_exit() -> None:
    program = (
        "import asyncio, threading\n"
        "from hutch.runtime.sinkthread import SinkThread\n"
        "async def main():\n"
        "    try: await asyncio.wait_for(SinkThread().call(threading.Event().wait), 0.1)\n"
        "    except TimeoutError: print('left')\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"left\n", b"")


class Raw(io.RawIOBase):
    """Takes a part of what it is given."""

    def __init__(self) -> None:
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        taken = max(1, len(memoryview(data)) // 2)
        self.size += taken
        return taken


class Awaited:
    """An ordinary ``write`` that gives something to be awaited."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: bytes) -> Any:
        async def later() -> None:
            self.size += len(data)

        return later()


@pytest.mark.root
@pytest.mark.parametrize("kind", [BlockingSink, Raw, Awaited])
async def test_no_thread_outlives_its_execution(
    box: LocalBox, kind: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinkthread, "_IDLE", 600)
    before, sinks = threads(), (kind(), kind())
    for sink in sinks:
        if isinstance(sink, BlockingSink):
            sink.open.set()
    with in_time(30):
        script = "dd if=/dev/zero bs=64k count=64 2>/dev/null; dd if=/dev/zero bs=64k count=64 >&2 2>/dev/null"
        execution = await box.exec(*sh(script), stdout=sinks[0], stderr=sinks[1])
        assert (await execution.wait()).exit_code == 0
        await until(lambda: threads() <= before)
    assert [len(s.data) if isinstance(s, BlockingSink) else s.size for s in sinks] == [4 * MIB] * 2


@pytest.mark.root
async def test_no_thread_outlives_an_execution_that_was_closed_once_its_sink_returns(
    box: LocalBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinkthread, "_IDLE", 600)
    before, sink = threads(), BlockingSink()
    try:
        with in_time():
            execution = await box.exec("yes", stdout=sink)
            await until(sink.called.is_set)
            await execution.kill()
            await execution.close()
            sink.open.set()
            await until(lambda: threads() <= before)
    finally:
        sink.open.set()
