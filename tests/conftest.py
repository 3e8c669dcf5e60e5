"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.engine.vm.kernel import Kernels
from hutch.host.binary import agent_path
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


@pytest.fixture(scope="session")
def vm_store() -> Path:
    """Kernel, templates and disks of VMs: kept between runs, for they take long to make."""
    given = os.environ.get("HUTCH_TEST_VM_STORE")
    store = Path(given) if given else Path(__file__).parents[1] / ".cache" / "vm"
    anyio.run(Kernels(store, agent_path()).ensure, lambda step: None)
    return store
