"""A fleet for tests: an API process and a runner process, and the two hops between client and box."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Self

from hutch.sdk.remote import RemoteRuntime
from tests.remote.faultproxy import FaultProxy
from tests.remote.processes import Process, free_port
from tests.runtime.helpers import in_time, until

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

KEY = "a-key-for-clients"
JOIN = "a-token-for-runners"


def api_process(folder: Path) -> Process:
    """An API on a database in the folder."""
    secrets = {"HUTCH_API_KEY": KEY, "HUTCH_JOIN_TOKEN": JOIN}
    database = folder / "fleet.db"
    return Process("-m", "hutch", "serve", "api", "--database", database, "--port", "{port}", env=secrets)


def runner_process(api: Process, home: Path, *options: str, public_url: str | None = None) -> Process:
    """A runner that joins the API, which reaches it by ``public_url``."""
    command = ["--join", api.url, "--home", home, "--port", "{port}", *options]
    command += ["--public-url", public_url] if public_url else []
    return Process("-m", "hutch", "serve", "runner", *command, env={"HUTCH_JOIN_TOKEN": JOIN})


def shared_home(folder: Path, images: Path) -> Path:
    """A fresh home that shares the images."""
    home = folder / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images)
    return home


class Fleet:
    """The processes, and the journals that the runners keep."""

    def __init__(self, api: Process, runner: Process, home: Path) -> None:
        self.api = api
        self.runner = runner
        self.homes = [home]
        self.made: set[str] = set()

    def journal(self) -> set[str]:
        """The boxes that the runners say they made."""
        paths = [home / "journal" for home in self.homes if (home / "journal").exists()]
        return {json.loads(line)["box"] for path in paths for line in path.read_text().splitlines()}

    def check_path(self) -> None:
        """Fail when a box was made past the runner."""
        bypassed = self.made - self.journal()
        assert not bypassed, f"boxes that never passed the runner: {bypassed}"


class Chain:
    """A fleet of its own with a fault proxy in both hops: ``front`` for clients, ``back`` between API and runner.

    The proxies do no harm until they are told to (`FaultProxy.choose`)."""

    def __init__(self, folder: Path, home: Path) -> None:
        behind = free_port()
        self.api = api_process(folder)
        self.runner = runner_process(self.api, home, public_url=f"http://127.0.0.1:{behind}")
        self.front = FaultProxy(self.api.port)
        self.back = FaultProxy(self.runner.port, listen=behind)
        self._parts = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as parts:
            await parts.enter_async_context(self.front)
            await parts.enter_async_context(self.back)
            parts.enter_context(self.api)
            parts.enter_context(self.runner)
            async with RemoteRuntime(self.api.url, KEY) as runtime:
                await joined(runtime)
            self._parts = parts.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._parts.aclose()


async def joined(runtime: RemoteRuntime, count: int = 1) -> None:
    """Wait until so many runners have joined."""

    async def there() -> bool:
        return (await runtime.info())["runners_alive"] == count

    with in_time():
        await until(there)
