"""Fixtures: an API process and a runner process, and the check that every box went through both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.sdk.remote import RemoteRuntime
from tests.e2e.fleet import KEY, Chain, Fleet, api_process, joined, runner_process, shared_home
from tests.remote.lines import Lines
from tests.runtime.conftest import IMAGE, images

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from hutch.sdk.remote_box import RemoteBox
    from tests.remote.processes import Process

__all__ = ["images"]


class Recording(RemoteRuntime):
    """Notes every box that it gets to know."""

    made: set[str]

    def handle(self, info):  # type: ignore[no-untyped-def]
        self.made.add(info.id)
        return super().handle(info)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The runner's home, which shares the images."""
    return shared_home(tmp_path_factory.mktemp("runner"), images)


@pytest.fixture(scope="session")
def api_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the API keeps its records."""
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="session")
def api(api_folder: Path) -> Iterator[Process]:
    """An API process on a fresh database; who kills it starts it again."""
    with api_process(api_folder) as process:
        yield process


@pytest.fixture(scope="session")
def runner(api: Process, home: Path) -> Iterator[Process]:
    """A runner process, which has joined; who kills it starts it again."""

    async def join() -> None:
        async with RemoteRuntime(api.url, KEY) as runtime:
            await joined(runtime)

    with runner_process(api, home) as process:
        anyio.run(join)
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
    box._channels = Lines(box)  # type: ignore[attr-defined]  # how the contract suite cuts connections
    return box


@pytest.fixture
async def chain(tmp_path: Path, images: Path) -> AsyncIterator[Chain]:
    """A fleet of its own with a fault proxy in both hops."""
    async with Chain(tmp_path, shared_home(tmp_path, images)) as chain:
        yield chain
