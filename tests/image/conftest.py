"""Fixtures: a registry, a misbehaving one, a store, and a small image."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from hutch.image import ImageStore, RegistryConfig
from tests.registry import DockerRegistry, HostileRegistry, Image, docker_registry, entry, hostile_registry, tar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    """Debian's registry."""
    with docker_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def hostile() -> Iterator[HostileRegistry]:
    """A registry that does what the test says."""
    with hostile_registry() as running:
        yield running


@pytest.fixture
def config() -> RegistryConfig:
    """Short patience, no logins of whoever runs the tests."""
    return RegistryConfig(docker_config=None, connect_timeout=3, read_timeout=3, retries=2)


@pytest.fixture
def store(tmp_path: Path, config: RegistryConfig) -> ImageStore:
    """An empty store."""
    return ImageStore(tmp_path / "images", config=config)


@pytest.fixture(scope="session")
def small() -> Image:
    """Two layers with files, a hard link, a whiteout and an opaque folder."""
    lower = tar(
        entry("etc"),
        entry("etc/gone", b"gone"),
        entry("etc/kept", b"kept", mode=0o600),
        entry("etc/same", type=b"1", linkname="etc/kept"),
        entry("opt"),
        entry("opt/hidden", b"hidden"),
    )
    upper = tar(
        entry("etc"),
        entry("etc/.wh.gone", b""),
        entry("opt", mode=0o1777),
        entry("opt/.wh..wh..opq", b""),
        entry("opt/new", b"new"),
    )
    return Image([lower, upper], {"Cmd": ["/bin/sh"], "Env": ["A=b"]})


@pytest.fixture(scope="session")
def large() -> Image:
    """One layer of 4 MiB that does not compress."""
    return Image([tar(entry("data", os.urandom(4 << 20)))])
