"""The network and the secrets of a box behind a server: the tests of the embedded runtime, over a server process that
is in the same small internet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.net import test_leaks, test_outbound, test_secrets
from tests.net.conftest import image_store, internet, world
from tests.remote.conftest import serving, shared_home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.net.world import World
    from tests.remote.processes import Process

pytestmark = [pytest.mark.root, pytest.mark.anyio]

__all__ = ["image_store", "internet", "world"]

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
def home(tmp_path_factory: pytest.TempPathFactory, image_store: Path) -> Path:
    """The server's home."""
    return shared_home(tmp_path_factory.mktemp("networked"), image_store)


@pytest.fixture(scope="module")
def server(home: Path, internet: World) -> Iterator[Process]:
    """A server in the internet, which logs all that it can."""
    loud = test_leaks.loud(home.with_name("loud"))
    with serving(home, env={"SSL_CERT_FILE": str(internet.ca), **loud}) as process:
        yield process


@pytest.fixture
def logs(home: Path, server: Process) -> Path:
    """Where the server and what it starts log all that they can tell."""
    folder = home.with_name("loud")
    assert (folder / f"{server.pid}.log").stat().st_size
    return folder
