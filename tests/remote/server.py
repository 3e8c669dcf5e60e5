"""A server process for tests: a home's boxes under ``/v1/x`` and the relay.

python server.py HOME PORT TOKEN
"""

from __future__ import annotations

import sys
from pathlib import Path

import anyio

from hutch.fleet.serve import run
from hutch.runtime.runtime import LocalRuntime
from hutch.server.app import make_app
from hutch.server.serve import listen
from hutch.server.settings import ServerSettings


async def main(*args: str) -> None:
    """See the module."""
    home, port, token = args
    settings = ServerSettings(state=Path(home) / "server", api_keys=(token,))
    with listen("127.0.0.1", int(port)) as sock:
        async with LocalRuntime(home) as runtime:
            await run(make_app(runtime, settings), settings, sock, "test server")


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
