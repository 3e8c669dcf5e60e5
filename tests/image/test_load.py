"""Images in files and folders."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import stat
import subprocess
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
from backports import zstd

from hutch.errors import ImageError, InvalidArgumentError, ResourceExhaustedError
from hutch.image import ImageStore, RegistryConfig
from tests.registry import OCI_MANIFEST, Image, digest, entry, index_of, tar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.root]

NAME = "org.opencontainers.image.ref.name"


def write_layout(folder: Path, *named: tuple[str, Image]) -> Path:
    """Write an OCI layout."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)
    entries = []
    for name, image in named:
        for blob in (*image.blobs, image.config_blob, image.manifest):
            (blobs / digest(blob)[7:]).write_bytes(blob)
        annotations = {"annotations": {NAME: name}} if name else {}
        entries.append(Image.descriptor(image.manifest, OCI_MANIFEST, **annotations))
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def pack(folder: Path, target: Path, compress: Callable[[bytes], bytes] = bytes) -> Path:
    """Make an archive of a folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.add(folder, ".")
    target.write_bytes(compress(out.getvalue()))
    return target


async def test_layout_folder(store: ImageStore, small: Image, tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "oci", ("example.org/app:v1", small))
    (info,) = await store.load(layout)
    assert info.references == ("example.org/app:v1",)
    assert info.digest == digest(small.config_blob)
    assert info.manifest_digest == digest(small.manifest)
    assert (store.layer_paths(info)[1] / "etc/kept").read_bytes() == b"kept"


@pytest.mark.parametrize("compress", [bytes, zstd.compress, gzip.compress, lzma.compress])
async def test_layout_archives(
    store: ImageStore, small: Image, tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    archive = pack(write_layout(tmp_path / "oci", ("v1", small)), tmp_path / "a.tar", compress)
    (info,) = await store.load(archive)
    assert info.references == ()  # "v1" alone is not a name
    (info,) = await store.load(archive, reference="app:v7")
    assert info.references == ("app:v7",)


async def test_choosing(store: ImageStore, small: Image, large: Image, tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "oci", ("v1", small), ("example.org/b:v2", large))
    assert len(await store.load(layout)) == 2
    assert [info.digest for info in await store.load(layout, reference="app:v1")] == [digest(small.config_blob)]
    (second,) = await store.load(layout, reference="example.org/b:v2")
    assert second.digest == digest(large.config_blob)
    with pytest.raises(InvalidArgumentError, match=r"2 images; choose one of: v1, example\.org/b:v2"):
        await store.load(layout, reference="app:v3")


async def test_nested_index(store: ImageStore, small: Image, tmp_path: Path) -> None:
    other = Image([tar(entry("arm", b""))], architecture="arm64")
    layout = write_layout(tmp_path / "oci", ("", small), ("", other))
    index = index_of([other, small])
    (layout / "blobs/sha256" / digest(index)[7:]).write_bytes(index)
    outer = Image.descriptor(index, "application/vnd.oci.image.index.v1+json", annotations={NAME: "a/b:c"})
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [outer]}))
    (info,) = await store.load(layout, platform="linux/arm64")
    assert (info.architecture, info.references) == ("arm64", ("a/b:c",))


async def test_skopeo_and_docker_archives(store: ImageStore, small: Image, tmp_path: Path) -> None:
    write_layout(tmp_path / "oci", ("v1", small))

    def copy(target: str) -> None:
        subprocess.run(["skopeo", "copy", "-q", "oci:oci:v1", target], check=True, cwd=tmp_path, capture_output=True)

    copy("docker-archive:saved.tar:example.org/app:saved")
    copy("oci-archive:layout.tar:example.org/app:packed")
    (saved,) = await store.load(tmp_path / "saved.tar")
    assert saved.references == ("example.org/app:saved",)
    assert (saved.cmd, saved.env, saved.layers) == (("/bin/sh",), ("A=b",), tuple(small.diff_ids))
    (packed,) = await store.load(tmp_path / "layout.tar")
    assert "example.org/app:packed" in packed.references
    assert packed.layers == saved.layers


def docker_archive(*members: tuple[tarfile.TarInfo, bytes], **changes: Any) -> bytes:
    saved = {"Config": "config.json", "RepoTags": ["app:v1"], "Layers": ["a/layer.tar", "b/layer.tar"], **changes}
    return tar(*members, entry("manifest.json", json.dumps([saved]).encode()))


async def test_old_docker_archives_have_links(store: ImageStore, small: Image, tmp_path: Path) -> None:
    members = [
        entry("config.json", small.config_blob),
        entry("real.tar", small.layers[0]),
        entry("a/layer.tar", type=b"2", linkname="../real.tar"),
        entry("b/layer.tar", small.layers[1]),
    ]
    path = tmp_path / "saved.tar"
    path.write_bytes(docker_archive(*members))
    (info,) = await store.load(path)
    assert info.layers == tuple(small.diff_ids)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"Config": "/etc/passwd"}, "missing"),
        ({"Config": "../../etc/passwd"}, "missing"),
        ({"Layers": ["a/layer.tar"]}, "names 2 layers and the manifest 1"),
        ({"Layers": ["a/layer.tar", "loop"]}, "missing"),
        ({"Layers": ["b/layer.tar", "a/layer.tar"]}, "uncompressed content has the digest"),
        ({"Layers": "x"}, "cannot be understood"),
    ],
)
async def test_lying_docker_archives(
    store: ImageStore, small: Image, tmp_path: Path, changes: dict[str, Any], cause: str
) -> None:
    members = [
        entry("config.json", small.config_blob),
        entry("a/layer.tar", small.layers[0]),
        entry("b/layer.tar", small.layers[1]),
        entry("loop", type=b"2", linkname="loop"),
    ]
    path = tmp_path / "saved.tar"
    path.write_bytes(docker_archive(*members, **changes))
    with pytest.raises(ImageError, match=rf"saved\.tar.*{cause}"):
        await store.load(path)
    assert store.list() == []


async def test_plain_folder(store: ImageStore, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/sh").write_bytes(b"#!")
    (tree / "bin/sh").chmod(0o4755)
    os.link(tree / "bin/sh", tree / "bin/ash")
    os.mkfifo(tree / "pipe")
    os.chown(tree / "pipe", 12, 34)
    (tree / "out").symlink_to("/etc/passwd")
    with pytest.raises(InvalidArgumentError, match="name it"):
        await store.load(tree)
    (info,) = await store.load(tree, reference="tree:v1")
    (layer,) = store.layer_paths(info)
    assert stat.S_IMODE((layer / "bin/sh").stat().st_mode) == 0o4755
    assert (layer / "bin/sh").samefile(layer / "bin/ash")
    assert (layer / "pipe").stat().st_gid == 34
    assert (layer / "out").readlink().as_posix() == "/etc/passwd"
    assert info.cmd == ("/bin/sh",)
    (again,) = await store.load(tree, reference="tree:v2")
    assert again.digest == info.digest
    assert again.references == ("tree:v1", "tree:v2")


@pytest.mark.parametrize("compress", [bytes, zstd.compress, bz2.compress])
async def test_plain_archives(store: ImageStore, tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "rootfs.tar"
    path.write_bytes(compress(tar(entry("etc"), entry("etc/hostname", b"h"))))
    (info,) = await store.load(path, reference="plain:v1")
    assert (store.layer_paths(info)[0] / "etc/hostname").read_bytes() == b"h"


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8bnot gzip really", os.urandom(5000)])
async def test_nonsense(store: ImageStore, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(ImageError):
        await store.load(path, reference="x:v1")
    assert store.list() == []


async def test_bombs(tmp_path: Path) -> None:
    config = RegistryConfig(docker_config=None, max_layer_bytes=1 << 20)
    store = ImageStore(tmp_path / "s", config=config)
    path = tmp_path / "bomb.tar.zst"
    path.write_bytes(zstd.compress(bytes(64 << 20)))
    with pytest.raises(ResourceExhaustedError, match="more than"):
        await store.load(path, reference="x:v1")
    giant = tarfile.TarInfo("pax")
    giant.type, giant.size = tarfile.XHDTYPE, 1 << 40
    path.write_bytes(giant.tobuf() + bytes(10240))
    with pytest.raises(ImageError):
        await store.load(path, reference="x:v1")


async def test_layout_that_lies(store: ImageStore, small: Image, tmp_path: Path) -> None:
    layout = write_layout(tmp_path / "oci", ("a/b:c", small))
    blob = layout / "blobs/sha256" / digest(small.blobs[0])[7:]
    right = blob.read_bytes()
    for wrong in (right[:-1], right + b"x", right[:-1] + bytes([right[-1] ^ 1])):
        blob.write_bytes(wrong)
        with pytest.raises(ImageError):
            await store.load(layout)
    blob.unlink()
    blob.symlink_to("/etc/passwd")
    with pytest.raises(ImageError, match="missing"):
        await store.load(layout)
    blob.unlink()
    os.mkfifo(blob)
    with pytest.raises(ImageError, match="missing"):
        await store.load(layout)
    blob.unlink()
    blob.write_bytes(right)
    assert len(await store.load(layout)) == 1


async def test_what_is_not_there(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        await store.load(tmp_path / "nothing", reference="x:v1")
