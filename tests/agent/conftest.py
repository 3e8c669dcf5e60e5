"""The agent as an ordinary process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .support import Agent, running_agent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .client import Client


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running_agent(hold_ms=400) as running:
        yield running
        assert running.process.poll() in (None, 0), "the agent died"


@pytest.fixture
def client(agent: Agent) -> Iterator[Client]:
    with agent.client() as connected:
        yield connected
