"""The floor: the same work by plain processes of the host, in no container at all."""

from __future__ import annotations

import asyncio
import os
import subprocess

TRUE = "/bin/true"


async def spawn_and_wait() -> None:
    """The least that a command can cost: posix_spawn(3) and waitpid(2)."""
    pid = os.posix_spawn(TRUE, [TRUE], {})  # noqa: ASYNC221  # to block is the point
    os.waitpid(pid, 0)  # noqa: ASYNC222


async def subprocess_run() -> None:
    """What a Python program does."""
    subprocess.run([TRUE])  # noqa: ASYNC221  # to block is the point


async def asyncio_subprocess() -> None:
    """What an asynchronous Python program does, collecting the output as ``box.run`` does."""
    process = await asyncio.create_subprocess_exec(
        TRUE, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    await process.communicate()
