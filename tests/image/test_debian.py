"""A real Debian, file by file against umoci."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from hutch.image import ImageStore
from tests import debian

if TYPE_CHECKING:
    from hutch.image import RegistryConfig
    from tests.registry import DockerRegistry

pytestmark = [pytest.mark.anyio, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
async def layout() -> Path:
    """An OCI layout with a minimal Debian."""
    return await debian.layout()


def listing(root: Path) -> dict[str, tuple[Any, ...]]:
    """Type, mode, owner, times, links, content and attributes of everything below a folder."""
    found: dict[str, tuple[Any, ...]] = {}
    inodes: dict[int, str] = {}
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(folders + files):
            path = Path(folder, name)
            status = path.lstat()
            relative = str(path.relative_to(root))
            content: object = None
            first = relative
            if stat.S_ISREG(status.st_mode):
                content = path.read_bytes()
                first = inodes.setdefault(status.st_ino, relative)
            elif stat.S_ISLNK(status.st_mode):
                content = path.readlink()
            names = os.listxattr(path, follow_symlinks=False)
            attributes = {key: os.getxattr(path, key, follow_symlinks=False) for key in names}
            mtime = None if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns // 10**9
            found[relative] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_rdev,
                mtime,
                first,
                content,
                attributes,
            )
    return found


async def test_pulled_debian_is_what_umoci_unpacks(
    registry: DockerRegistry, layout: Path, tmp_path: Path, config: RegistryConfig
) -> None:
    target = f"docker://{registry.host}/debian:v1"
    await anyio.run_process(["skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:debian", target])
    store = ImageStore(tmp_path / "images", config=config)
    info = await store.pull(f"{registry.host}/debian:v1")
    top, bottom = store.layer_paths(info)
    assert stat.S_ISCHR((top / "etc/issue").lstat().st_mode)
    await anyio.run_process(["umoci", "unpack", "--image", f"{layout}:debian", str(tmp_path / "bundle")])
    theirs = listing(tmp_path / "bundle/rootfs")
    ours = listing(bottom)
    assert len(ours) > 5000
    del ours["etc/issue"]
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
