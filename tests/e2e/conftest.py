"""Fixtures: an API process and a runner process, and the check that every box went through both."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hutch.sdk.remote import RemoteRuntime
from tests.remote.processes import Process
from tests.runtime.conftest import IMAGE, images
from tests.runtime.helpers import in_time, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from hutch.sdk.remote_box import RemoteBox

__all__ = ["images"]

KEY = "a-key-for-clients"
JOIN = "a-token-for-runners"


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


class Recording(RemoteRuntime):
    """Notes every box that it gets to know."""

    made: set[str]

    def handle(self, info):  # type: ignore[no-untyped-def]
        self.made.add(info.id)
        return super().handle(info)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The runner's home, which shares the images."""
    home = tmp_path_factory.mktemp("runner") / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images)
    return home


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """An API process on a fresh database; who kills it starts it again."""
    database = tmp_path_factory.mktemp("api") / "fleet.db"
    secrets = {"HUTCH_API_KEY": KEY, "HUTCH_JOIN_TOKEN": JOIN}
    with Process("-m", "hutch", "serve", "api", "--database", database, "--port", "{port}", env=secrets) as process:
        yield process


def runner_process(api: Process, home: Path) -> Process:
    """A runner that joins the API."""
    options = ("--join", api.url, "--home", home, "--port", "{port}")
    return Process("-m", "hutch", "serve", "runner", *options, env={"HUTCH_JOIN_TOKEN": JOIN})


@pytest.fixture(scope="session")
def runner(api: Process, home: Path) -> Iterator[Process]:
    """A runner process; who kills it starts it again."""
    with runner_process(api, home) as process:
        yield process


@pytest.fixture
def fleet(api: Process, runner: Process, home: Path) -> Iterator[Fleet]:
    """API and runner. At the end every box must have passed the runner."""
    fleet = Fleet(api, runner, home)
    yield fleet
    fleet.check_path()


@pytest.fixture
async def runtime(fleet: Fleet) -> AsyncIterator[RemoteRuntime]:
    """The fleet's runtime, with the runner joined."""
    Recording.made = fleet.made
    async with Recording(fleet.api.url, KEY) as runtime:
        await joined(runtime)
        yield runtime
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)


@pytest.fixture
async def box(runtime: RemoteRuntime) -> RemoteBox:
    """A running box."""
    box = await runtime.create(IMAGE)
    await box.start()
    return box


async def joined(runtime: RemoteRuntime, count: int = 1) -> None:
    """Wait until so many runners have joined."""

    async def there() -> bool:
        return (await runtime.info())["runners_alive"] == count

    with in_time():
        await until(there)
