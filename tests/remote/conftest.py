"""Fixtures: the same names as those of the embedded runtime, but there is a server process in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hutch.sdk.remote import RemoteRuntime
from tests.remote.lines import Lines
from tests.remote.processes import Process
from tests.runtime.conftest import IMAGE, images

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from pathlib import Path

    from hutch.sdk.remote_box import RemoteBox

__all__ = ["images"]

TOKEN = "a-token-for-tests"


def shared_home(folder: Path, images: Path) -> Path:
    """A fresh home that shares the images."""
    home = folder / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images)
    return home


def serving(home: Path, *options: str, env: Mapping[str, str] | None = None) -> Process:
    """A server process over a home."""
    command = ("-m", "hutch", "--home", home, "serve", "--port", "{port}", "--api-key", TOKEN)
    return Process(*command, *options, env=env)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A home that shares the images. One for all tests: a server takes long to start, compared to a runtime."""
    return shared_home(tmp_path_factory.mktemp("served"), images)


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[Process]:
    """A server process over the home; who kills it starts it again. Modules that need another one have their own."""
    with serving(home) as process:
        yield process


@pytest.fixture
async def runtime(server: Process) -> AsyncIterator[RemoteRuntime]:
    """The server's runtime. Nothing of its boxes is left afterwards."""
    async with RemoteRuntime(server.url, TOKEN) as runtime:
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
