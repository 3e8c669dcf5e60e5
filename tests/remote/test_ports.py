"""Tunnels and forwarded ports of a box behind a server: the tests of the embedded runtime, over a server process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.net import test_ports
from tests.net.conftest import image_store
from tests.remote.conftest import serving, shared_home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.remote.processes import Process

pytestmark = [pytest.mark.root, pytest.mark.anyio]

__all__ = ["image_store"]

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
def server(tmp_path_factory: pytest.TempPathFactory, image_store: Path) -> Iterator[Process]:
    """A server whose image has an echo server."""
    with serving(shared_home(tmp_path_factory.mktemp("ported"), image_store)) as process:
        yield process
