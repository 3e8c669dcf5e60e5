"""A server in a process of its own, on a home of its own that has one image."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import anyio
import httpx2
import pytest

from hutch.runtime.runtime import LocalRuntime
from tests import rootfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IMAGE = "busybox:test"
KEY, READ_KEY = "correct-horse", "battery-staple"


class Served:
    """A running `hutch serve`."""

    def __init__(self, home: Path, *options: str, env: dict[str, str] | None = None) -> None:
        self.home = home
        self.options = options
        self.env = env or {}
        self.start()

    def start(self, port: int = 0) -> None:
        """Start it and wait for the line that tells its address."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hutch", "--home", str(self.home), "serve", "--port", str(port), *self.options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**{key: value for key, value in os.environ.items() if key != "HUTCH_API_KEY"}, **self.env},
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("Hutch serves on "), line + self._rest()
        self.url = line.split()[-1]
        self.port = int(self.url.rpartition(":")[2])

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Stop it and return its exit code."""
        self.process.send_signal(signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.process.kill()
        self.errors = self._rest()
        return self.process.wait()

    def _rest(self) -> str:
        assert self.process.stdout is not None and self.process.stderr is not None
        with self.process.stdout, self.process.stderr:
            return self.process.stderr.read()


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


def make_home(folder: Path, images: Path) -> Path:
    """A fresh home that shares the images."""
    home = folder / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images)
    return home


def empty(home: Path) -> None:
    """Remove all boxes of a home."""

    async def remove() -> None:
        async with LocalRuntime(home) as runtime:
            for info in await runtime.list():
                await runtime.remove(info.id, force=True)

    anyio.run(remove)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Served]:
    """One server for the tests that do not disturb each other."""
    home = make_home(tmp_path_factory.mktemp("served"), images)
    server = Served(home)
    yield server
    code = server.stop()
    empty(home)
    assert code == 0
    assert "Traceback" not in server.errors, server.errors


@pytest.fixture
def http(served: Served) -> Iterator[httpx2.Client]:
    """A client of that server."""
    with httpx2.Client(base_url=served.url, timeout=30) as client:
        yield client


@pytest.fixture
def box(http: httpx2.Client) -> Iterator[str]:
    """The id of a box that has been started."""
    made = http.post("/v1/boxes", json={"image": IMAGE})
    assert made.status_code == 201, made.text
    box_id = made.json()["box_id"]
    assert http.post(f"/v1/boxes/{box_id}/start").status_code == 200
    yield box_id
    http.delete(f"/v1/boxes/{box_id}", params={"force": "true"})
