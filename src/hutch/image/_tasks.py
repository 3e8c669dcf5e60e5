"""Run several coroutines as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def together(*calls: Callable[[], Awaitable[None]], limit: int | None = None) -> None:
    """Run the calls concurrently, at most ``limit`` at a time. The first failure cancels the others and is raised."""
    failures: list[Exception] = []
    slots = anyio.Semaphore(limit or len(calls) or 1)

    async def guarded(call: Callable[[], Awaitable[None]]) -> None:
        try:
            async with slots:
                await call()
        except Exception as error:
            failures.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for call in calls:
            group.start_soon(guarded, call)
    if failures:
        raise failures[0]
