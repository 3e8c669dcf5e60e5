"""Fixtures: a runtime over a fresh home that shares one image, and a box in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.runtime.runtime import LocalRuntime
from tests import rootfs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hutch.runtime.box import LocalBox

IMAGE = "busybox:test"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image store that holds the test image."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    home = tmp_path_factory.mktemp("seed") / "home"
    tree = rootfs.build(tmp_path_factory.mktemp("image") / "rootfs")

    async def load() -> None:
        async with LocalRuntime(home) as runtime:
            await runtime.images.load(tree, reference=IMAGE)

    anyio.run(load)
    return home / "images"


@pytest.fixture
def home(tmp_path: Path, images: Path) -> Path:
    """A fresh home that shares the images."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images)
    return home


@pytest.fixture
async def runtime(home: Path) -> AsyncIterator[LocalRuntime]:
    """A runtime over the fresh home. Nothing of its boxes is left afterwards."""
    async with LocalRuntime(home) as runtime:
        yield runtime
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)


@pytest.fixture
async def box(runtime: LocalRuntime) -> LocalBox:
    """A running box."""
    box = await runtime.create(IMAGE)
    await box.start()
    return box
