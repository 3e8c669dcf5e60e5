"""A host process for the tests to kill: starts a command in a detached box, and passes on what the command writes.

    python detached_host.py HOME IMAGE COMMAND…

The first line on standard output is "<box id> <execution id>"; the rest is the command's standard output.
"""

from __future__ import annotations

import os
import sys
import threading

import anyio

import hutch


def put(data: bytes) -> None:
    """Write all to standard output; blocks like any pipe."""
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


class Out:
    """Standard output as a sink with a blocking ``write``: what it has returned from is acknowledged, no more."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def write(self, data: bytes) -> None:
        self.open.wait()
        put(data)


async def main(*arguments: str) -> None:
    """See the module."""
    home, image, *command = arguments
    async with hutch.Runtime.local(home) as runtime:
        box = await runtime.create(image, detach=True)
        await box.start()
        out = Out()
        execution = await box.exec(*command, stdout=out)
        put(f"{box.id} {execution.id}\n".encode())
        out.open.set()
        await execution.wait()
        await anyio.sleep_forever()


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
