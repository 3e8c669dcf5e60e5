"""Shared fixtures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.ordinary_user import OrdinaryUser, prepared

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def ordinary_user() -> Iterator[OrdinaryUser]:
    """A user without any privilege, and what programs that run as that user need."""
    with prepared() as user:
        yield user
