"""The published client, unmodified, against API and runner processes; what it makes must have passed both."""

from __future__ import annotations

import os
import re
import sys

import anyio
import pytest

from tests.e2e.fleet import KEY, Fleet
from tests.remote.faultproxy import FaultProxy
from tests.server.test_boxlite import CASES, SCRIPT

pytestmark = [pytest.mark.root, pytest.mark.anyio]

_BOX = re.compile(rb'"box_id":"([^"]+)"')


@pytest.mark.parametrize("case", [*CASES, "census", "census_with_cuts"])
async def test_published_client(fleet: Fleet, case: str) -> None:
    def note(data: bytes) -> None:
        fleet.made.update(found.decode() for found in _BOX.findall(data))

    async with FaultProxy(fleet.api.port, watch=note) as proxy:
        done = await anyio.run_process(
            [sys.executable, SCRIPT, case, proxy.url],
            env={**os.environ, "BOXLITE_API_KEY": KEY},
            check=False,
        )
    assert done.stdout == b"passed\n", done.stderr[-4000:].decode()
    assert fleet.made
