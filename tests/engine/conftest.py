"""Fixtures for boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hutch.engine.container import ContainerEngine
from hutch.engine.vm import VmEngine
from tests import rootfs as rootfs_builder

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.engine.base import Engine


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked test image."""
    return rootfs_builder.build(tmp_path_factory.mktemp("image") / "rootfs")


@pytest.fixture
def container() -> ContainerEngine:
    """The engine of containers, for whoever runs the tests."""
    engine = ContainerEngine()
    engine.check()
    return engine


@pytest.fixture
def vm(vm_store: Path) -> VmEngine:
    """The engine of VMs, for whoever runs the tests."""
    engine = VmEngine(vm_store)
    engine.check()
    return engine


@pytest.fixture(params=["container", "vm"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """The engine under test: each in turn."""
    found: Engine = request.getfixturevalue(request.param)
    return found
