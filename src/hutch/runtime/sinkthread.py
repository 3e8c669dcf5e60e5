"""A thread that calls one blocking sink, kept from call to call: handing a call to it costs half of what a pool costs,
and a sink that blocks takes no thread from others."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import queue
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds without a call after which the thread is given up; the next call starts another one.
_IDLE = 5.0


class SinkThread:
    """Makes calls in a thread of its own, one after the other, for tasks of one event loop.

    The thread is a daemon: a call that never returns holds up neither the loop's end nor the interpreter's.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] | None = None

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what the function returns, or raise what it raises. It is called in the caller's context.

        Cancelling abandons the call: it is not made if it has not begun, and left alone if it has.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            work = functools.partial(_work, self._jobs, loop, self._retire)
            threading.Thread(target=work, name="hutch-sink", daemon=True).start()
        self._jobs.put(_Job(contextvars.copy_context(), function, args, done))
        return await done

    def close(self) -> None:
        """Let the thread end, once the call that it makes has returned. Idempotent."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None

    def _retire(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        # Here, in the loop's thread, nothing can be put into an empty queue meanwhile.
        if jobs is self._jobs and jobs.empty():
            self.close()


class _Job(NamedTuple):
    context: contextvars.Context
    function: Callable[..., Any]
    args: tuple[Any, ...]
    done: asyncio.Future[Any]


def _work(
    jobs: queue.SimpleQueue[_Job | None],
    loop: asyncio.AbstractEventLoop,
    retire: Callable[[queue.SimpleQueue[_Job | None]], None],
) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits
        while True:
            try:
                job = jobs.get(timeout=_IDLE)
            except queue.Empty:
                loop.call_soon_threadsafe(retire, jobs)
                job = jobs.get()
            if job is None:
                return
            if job.done.cancelled():
                continue
            result, error = None, None
            try:
                result = job.context.run(job.function, *job.args)
            except BaseException as caught:  # it is the caller's, whatever it is
                error = caught
            loop.call_soon_threadsafe(_settle, job.done, result, error)
            del job, result, error  # a view of a window must not outlive its call


def _settle(done: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if done.cancelled():
        return
    if isinstance(error, StopIteration):  # no future takes that
        wrapped = RuntimeError("the sink raised StopIteration")
        wrapped.__cause__ = error
        error = wrapped
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
