"""The network and the secrets of a box behind a server: the tests of the embedded runtime, over a server process that
is in the same small internet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.leaks import holders, searched
from tests.net import test_outbound, test_secrets
from tests.net.conftest import get_tls, image_store, internet, world
from tests.net.test_secrets import VALUE, _authority
from tests.net.world import GOOD
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
    """A server in the internet."""
    with serving(home, env={"SSL_CERT_FILE": str(internet.ca)}) as process:
        yield process


async def test_the_server_does_not_keep_the_value(
    box: Any, home: Path, server: Process, world: World, tmp_path: Path
) -> None:
    """Not in any file of the home, and the server's own records are among them; not in its command line and
    environment."""
    assert await get_tls(
        box, GOOD, "good.test", await _authority(box, tmp_path), more="X-Key: <HUTCH_SECRET:API_KEY>\r\n"
    )
    assert VALUE in world.requests[-1]  # the control: it was used
    assert home / "server" / "server.db" in searched(home)
    assert holders(VALUE, home, processes=(server.pid,)) == []
