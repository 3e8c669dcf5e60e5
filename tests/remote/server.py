"""A server process for tests: a home's boxes under ``/v1/x`` and the relay.

    python server.py HOME PORT TOKEN
"""

from __future__ import annotations

import sys

import anyio

from hutch.fleet.runner import make_app
from hutch.fleet.serve import listen, run
from hutch.runtime.runtime import LocalRuntime


async def main(*args: str) -> None:
    """See the module."""
    home, port, token = args
    with listen("127.0.0.1", int(port)) as sock:
        async with LocalRuntime(home) as runtime:
            await run(make_app(runtime, token), sock, "test server")


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
