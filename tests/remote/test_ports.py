"""Tunnels and forwarded ports of a box behind a server: the tests of the embedded runtime, over a server process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hutch.sdk.remote import RemoteRuntime
from tests.net import test_ports
from tests.net.conftest import image_store, talk
from tests.remote.conftest import TOKEN
from tests.remote.processes import Process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.anyio]

__all__ = ["image_store", "talk"]

# Who publishes a port does so on the machine of the box.
HERE = {
    "test_published_ports_outlive_their_maker_and_a_killed_gateway",
    "test_a_port_that_is_taken_is_an_error_of_the_start",
}

globals().update(
    {name: value for name, value in vars(test_ports).items() if name.startswith("test_") and name not in HERE}
)
box = test_ports.box


@pytest.fixture(scope="module")
def ported(tmp_path_factory: pytest.TempPathFactory, image_store: Path) -> Iterator[Process]:
    """A server whose image has an echo server."""
    home = tmp_path_factory.mktemp("ported") / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(image_store)
    with Process("-m", "hutch", "--home", home, "serve", "--port", "{port}", "--api-key", TOKEN) as process:
        yield process


@pytest.fixture
async def runtime(ported: Process) -> AsyncIterator[RemoteRuntime]:
    """The server's runtime. Nothing of its boxes is left afterwards."""
    async with RemoteRuntime(ported.url, TOKEN) as runtime:
        yield runtime
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)
