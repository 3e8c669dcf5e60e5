"""The network and the secrets of a box behind a server: the tests of the embedded runtime, over a server process that
is in the same small internet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hutch.sdk.remote import RemoteRuntime
from tests.net import test_leaks, test_outbound, test_secrets
from tests.net.conftest import image_store, internet, talk, world
from tests.remote.conftest import TOKEN
from tests.remote.processes import Process

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.net.world import World

pytestmark = [pytest.mark.root, pytest.mark.anyio]

__all__ = ["image_store", "internet", "talk", "world"]

ALSO = (
    test_outbound.test_disabled_has_nothing_but_its_loopback,
    test_outbound.test_enabled_reaches_everybody,
    test_outbound.test_a_name_rule_admits_by_host_and_by_server_name,
    test_outbound.test_the_policy_changes_while_the_box_runs,
    test_outbound.test_a_disabled_box_can_get_a_network_while_it_runs,
    test_outbound.test_the_policy_survives_a_restart_of_the_box,
    test_outbound.test_traffic_is_counted,
    test_leaks.test_the_value_is_nowhere,
)

# What the gateway trusts is the server's affair.
ELSEWHERE = {"test_a_host_that_cannot_prove_itself_gets_nothing"}

globals().update(
    {name: value for name, value in vars(test_secrets).items() if name.startswith("test_") and name not in ELSEWHERE}
)
globals().update({test.__name__: test for test in ALSO})
box = test_secrets.box


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, image_store: Path, internet: World
) -> Iterator[tuple[Process, Path]]:
    """A server in the internet, and its home."""
    home = tmp_path_factory.mktemp("networked") / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(image_store)
    command = ["-m", "hutch", "--home", home, "serve", "--port", "{port}", "--api-key", TOKEN]
    environment = {"SSL_CERT_FILE": str(internet.ca), **test_leaks.loud(home.with_name("loud"))}
    with Process(*command, env=environment) as process:
        yield process, home


@pytest.fixture
def home(served: tuple[Process, Path]) -> Path:
    """The server's home."""
    return served[1]


@pytest.fixture
async def runtime(served: tuple[Process, Path], world: World) -> AsyncIterator[RemoteRuntime]:
    """The server's runtime. Nothing of its boxes is left afterwards."""
    async with RemoteRuntime(served[0].url, TOKEN) as runtime:
        yield runtime
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)


@pytest.fixture
def logs(served: tuple[Process, Path]) -> Path:
    """Where the server and what it starts log all that they can tell."""
    folder = served[1].with_name("loud")
    assert (folder / f"{served[0].pid}.log").stat().st_size
    return folder
