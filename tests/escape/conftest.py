"""Fixtures: an image with the prober in it, and how attempts are made on the host and in a box."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from tests import rootfs as rootfs_builder
from tests.engine import boxes

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(__file__).with_name("probe.c")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system with the prober in it."""
    image = rootfs_builder.build(tmp_path_factory.mktemp("image") / "rootfs")
    subprocess.run(["gcc", "-static", "-O1", "-o", image / "bin/probe", SOURCE], check=True)
    return image


@pytest.fixture(scope="module")
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the host with root's rights, for controls."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def on_host(image: Path, *words: str) -> boxes.Output:
    """Make an attempt on the host: the control."""
    done = subprocess.run([image / "bin/probe", *words], capture_output=True, text=True, timeout=20, cwd="/")
    return boxes.Output(done.returncode, done.stdout, done.stderr)


def in_box(box: boxes.Box, *words: str, user: str = "") -> boxes.Output:
    """Make an attempt in a box."""

    async def run() -> boxes.Output:
        return await box.run("probe", *words, user=user)

    return anyio.run(run)
