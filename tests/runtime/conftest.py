"""Fixtures: a runtime over a fresh home that shares one image, and a box in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from hutch.runtime.runtime import LocalRuntime
from tests import rootfs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.types import BoxSpec

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
def home(tmp_path: Path, images: Path, vm_store: Path) -> Path:
    """A fresh home that shares the images, and what VMs are made from."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images)
    (home / "vm").symlink_to(vm_store)
    return home


class RuntimeOf(LocalRuntime):
    """A runtime whose boxes are of one kind."""

    isolation = "container"

    async def create(self, image: str | BoxSpec, **options: Any) -> LocalBox:
        """See `LocalRuntime.create`."""
        return await super().create(image, **{"isolation": self.isolation, **options})


@pytest.fixture
def isolation() -> str:
    """What the boxes are isolated by: containers, or what HUTCH_TEST_ISOLATION says."""
    return os.environ.get("HUTCH_TEST_ISOLATION", "container")


@pytest.fixture
async def runtime(home: Path, isolation: str) -> AsyncIterator[LocalRuntime]:
    """A runtime over the fresh home. Nothing of its boxes is left afterwards."""
    runtime = RuntimeOf(home)
    runtime.isolation = isolation
    async with runtime:
        yield runtime
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)


@pytest.fixture
async def box(runtime: LocalRuntime) -> LocalBox:
    """A running box."""
    box = await runtime.create(IMAGE)
    await box.start()
    return box
