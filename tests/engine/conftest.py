"""Fixtures for boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hutch.engine.container import ContainerEngine
from tests import rootfs as rootfs_builder

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked test image."""
    return rootfs_builder.build(tmp_path_factory.mktemp("image") / "rootfs")


@pytest.fixture
def engine() -> ContainerEngine:
    """The engine under test, for whoever runs the tests."""
    engine = ContainerEngine()
    engine.check()
    return engine
