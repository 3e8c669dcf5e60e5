"""Pulling from a real registry."""

from __future__ import annotations

import gzip
import os
import stat
import subprocess
from typing import TYPE_CHECKING

import anyio
import msgspec
import pytest
from backports import zstd

from hutch.errors import ImageError, InvalidArgumentError, NotFoundError, ResourceExhaustedError
from hutch.image import Credential, ImageStore, RegistryConfig
from tests.registry import Image, digest, docker_registry, entry, tar

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.types import Progress
    from tests.registry import DockerRegistry

pytestmark = [pytest.mark.anyio, pytest.mark.root]

# htpasswd of user "ann", password "secret-word" (bcrypt, cost 5)
HTPASSWD = "ann:$2y$05$abcdefghijklmnopqrstuuUOabO4v2PoT/v47Y.znQK.9MsMDnesq\n"


async def test_an_image_arrives_whole(registry: DockerRegistry, store: ImageStore, small: Image) -> None:
    named = registry.push("whole", "v1", small)
    steps: list[Progress] = []
    info = await store.pull(f"{registry.host}/whole:v1", progress=steps.append)
    assert info.digest == digest(small.config_blob)
    assert info.manifest_digest == named
    assert info.references == (f"{registry.host}/whole:v1",)
    assert info.layers == tuple(small.diff_ids)
    assert (info.cmd, info.env) == (("/bin/sh",), ("A=b",))
    assert info == store.get(f"{registry.host}/whole:v1") == store.get(info.digest) == store.get(info.digest[7:15])

    upper, lower = store.layer_paths(info)
    assert (lower / "etc/kept").read_bytes() == b"kept"
    assert stat.S_IMODE((lower / "etc/kept").stat().st_mode) == 0o600
    assert (lower / "etc/kept").samefile(lower / "etc/same")
    whiteout = (upper / "etc/gone").lstat()
    assert stat.S_ISCHR(whiteout.st_mode)
    assert whiteout.st_rdev == 0
    assert os.getxattr(upper / "opt", "trusted.overlay.opaque") == b"y"
    assert [path.name for path in (upper / "opt").iterdir()] == ["new"]

    assert [step.phase for step in steps[:1]] == ["resolve"]
    assert steps[-1].phase == "done"
    for layer, blob in zip(small.diff_ids, small.blobs, strict=True):
        mine = [step for step in steps if step.item == layer]
        assert [step.phase for step in mine][-2:] == ["unpack", "done"]
        assert mine[-2].done == mine[-2].total == len(blob)


async def test_a_known_image_is_not_fetched(registry: DockerRegistry, store: ImageStore, small: Image) -> None:
    registry.push("known", "v1", small)
    first = await store.pull(f"{registry.host}/known:v1")
    other = Image([tar(entry("other", b"x"))])
    registry.push("known", "v1", other)
    steps: list[Progress] = []
    assert await store.pull(f"{registry.host}/known:v1", progress=steps.append) == first
    assert [step.phase for step in steps] == ["exists"]
    second = await store.pull(f"{registry.host}/known:v1", always=True)
    assert second.digest == digest(other.config_blob)
    assert store.get(first.digest).references == ()


async def test_layers_are_shared(registry: DockerRegistry, store: ImageStore, small: Image) -> None:
    registry.push("shared", "v1", small)
    registry.push("shared", "v2", Image([small.layers[0], tar(entry("more", b"m"))]))
    first = await store.pull(f"{registry.host}/shared:v1")
    steps: list[Progress] = []
    second = await store.pull(f"{registry.host}/shared:v2", progress=steps.append)
    assert store.layer_paths(first)[-1] == store.layer_paths(second)[-1]
    assert [step.phase for step in steps if step.item == small.diff_ids[0]] == ["exists"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), ("+zstd", zstd.compress), ("+gzip", lambda data: gzip_members(data))],
    ids=["plain", "zstd", "gzip-members"],
)
async def test_compressions(registry: DockerRegistry, store: ImageStore, suffix: str, compress: type[bytes]) -> None:
    content = os.urandom(200_000) + bytes(3_000_000)
    image = Image([tar(entry("file", content))], suffix=suffix, compress=compress)
    registry.push("compressed", "v" + suffix.strip("+"), image)
    info = await store.pull(f"{registry.host}/compressed:v{suffix.strip('+')}", always=True)
    (layer,) = store.layer_paths(info)
    assert (layer / "file").read_bytes() == content


def gzip_members(data: bytes) -> bytes:
    return gzip.compress(data[:100_000]) + gzip.compress(data[100_000:])


async def test_the_same_layer_twice(registry: DockerRegistry, store: ImageStore, small: Image) -> None:
    image = Image([small.layers[0], tar(entry("x", b"x")), small.layers[0]])
    registry.push("twice", "v1", image)
    info = await store.pull(f"{registry.host}/twice:v1")
    assert len(info.layers) == 3
    names = [path.parent.name for path in store.layer_paths(info)]
    assert names == [image.diff_ids[0][7:], image.diff_ids[1][7:]]


async def test_platforms(registry: DockerRegistry, store: ImageStore) -> None:
    images = [Image([tar(entry("is", arch.encode()))], architecture=arch) for arch in ("arm64", "amd64", "s390x")]
    named = registry.push("multi", "v1", images)
    reference = f"{registry.host}/multi:v1"
    for image in images:
        info = await store.pull(reference, platform=f"linux/{image.architecture}", always=True)
        assert (store.layer_paths(info)[0] / "is").read_text() == image.architecture == info.architecture
        assert info.manifest_digest == digest(image.manifest)
    # The local image of that name is for s390x now: not what was asked for.
    assert (await store.pull(reference, platform="linux/arm64")).architecture == "arm64"
    by_digest = await store.pull(f"{registry.host}/multi@{named}", platform="linux/amd64")
    assert by_digest.architecture == "amd64"
    with pytest.raises(
        ImageError, match=r"multi:v1.*no image for linux/riscv64.*linux/amd64, linux/arm64, linux/s390x"
    ):
        await store.pull(reference, platform="linux/riscv64")
    registry.push("multi", "single", images[2])
    with pytest.raises(ImageError, match="is for linux/s390x, not for linux/amd64"):
        await store.pull(f"{registry.host}/multi:single", platform="linux/amd64")


async def test_what_is_not_there(registry: DockerRegistry, store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=rf"image '{registry.host}/no:v1': registry {registry.host}: .*check the name"):
        await store.pull(f"{registry.host}/no:v1")
    with pytest.raises(ImageError, match=r"registry 127\.0\.0\.1:1: .*(refused|failed)"):
        await store.pull("127.0.0.1:1/no:v1")
    with pytest.raises(InvalidArgumentError):
        await store.pull("no/")
    with pytest.raises(NotFoundError, match="no image"):
        store.get(f"{registry.host}/no:v1")
    assert store.list() == []


async def test_mirrors_go_first(registry: DockerRegistry, tmp_path: Path, small: Image, config: RegistryConfig) -> None:
    registry.push("library/mirrored", "v1", small)
    registry.push("prefix/library/behind", "v1", small)
    mirrors = {"docker.io": ["127.0.0.1:1", f"http://{registry.host}", f"{registry.host}/prefix"]}
    store = ImageStore(tmp_path / "images", config=msgspec.structs.replace(config, mirrors=mirrors))
    info = await store.pull("mirrored:v1")
    assert info.references == ("mirrored:v1",)
    assert (await store.pull("behind:v1")).digest == info.digest


async def test_basic_login(tmp_path: Path, small: Image, config: RegistryConfig) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    with docker_registry(folder) as filled:
        filled.push("private", "v1", small)
    with docker_registry(folder, users=HTPASSWD) as private:
        reference = f"{private.host}/private:v1"
        for wrong, cause in ((None, "wants a login"), (Credential("ann", "wrong"), "unauthenticated")):
            logins = {private.host: wrong} if wrong else {}
            store = ImageStore(tmp_path / "no", config=msgspec.structs.replace(config, credentials=logins))
            with pytest.raises(ImageError, match=cause) as caught:
                await store.pull(reference)
            assert "wrong" not in str(caught.value)
        right = {private.host: Credential("ann", "secret-word")}
        store = ImageStore(tmp_path / "yes", config=msgspec.structs.replace(config, credentials=right))
        assert (await store.pull(reference)).digest == digest(small.config_blob)


async def test_limits(registry: DockerRegistry, tmp_path: Path, config: RegistryConfig) -> None:
    bomb = Image([tar(*(entry(f"f{number}", bytes(1 << 20)) for number in range(40)))])
    registry.push("bomb", "v1", bomb)
    for limit in ({"max_layer_bytes": 10 << 20}, {"max_layer_entries": 10}):
        images = tmp_path / next(iter(limit))
        store = ImageStore(images, config=msgspec.structs.replace(config, **limit))
        with pytest.raises(ResourceExhaustedError, match="bomb:v1"):
            await store.pull(f"{registry.host}/bomb:v1")
        assert list((images / "tmp").iterdir()) == list((images / "layers").iterdir()) == []


@pytest.mark.parametrize(
    "member",
    [entry("../evil", b"x"), entry("x", type=b"3", devmajor=0, devminor=0), entry("a", type=b"1", linkname="../../b")],
    ids=["dots", "whiteout-device", "hard-link-out"],
)
async def test_hostile_layers_leave_nothing(
    registry: DockerRegistry, store: ImageStore, tmp_path: Path, member: tuple[object, bytes]
) -> None:
    registry.push("evil", "v1", Image([tar(entry("good", b"x"), member)]))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"evil:v1.*cannot be unpacked"):
        await store.pull(f"{registry.host}/evil:v1", always=True)
    assert store.list() == []
    assert list((tmp_path / "images" / "layers").iterdir()) == list((tmp_path / "images" / "tmp").iterdir()) == []
    assert not list(tmp_path.rglob("evil"))


async def test_the_store_is_private(registry: DockerRegistry, store: ImageStore, small: Image, tmp_path: Path) -> None:
    registry.push("mine", "v1", small)
    await store.pull(f"{registry.host}/mine:v1")
    assert stat.S_IMODE((tmp_path / "images").stat().st_mode) == 0o700


async def test_umoci_layers(registry: DockerRegistry, store: ImageStore, tmp_path: Path) -> None:
    """umoci writes archives without an end, and without the padding of the last file."""

    def umoci(*words: str) -> None:
        subprocess.run(["umoci", *words], check=True, cwd=tmp_path, capture_output=True)

    (tmp_path / "tree/etc").mkdir(parents=True)
    (tmp_path / "tree/etc/a").write_text("a")
    (tmp_path / "odd").write_text("odd")
    umoci("init", "--layout", "oci")
    umoci("new", "--image", "oci:v1")
    umoci("insert", "--image", "oci:v1", "tree", "/")
    umoci("insert", "--image", "oci:v1", "odd", "/etc/odd")
    umoci("insert", "--image", "oci:v1", "--whiteout", "/etc/a")
    target = f"docker://{registry.host}/umoci:v1"
    await anyio.run_process(["skopeo", "copy", "-q", "--dest-tls-verify=false", "oci:oci:v1", target], cwd=tmp_path)
    info = await store.pull(f"{registry.host}/umoci:v1")
    top, middle, bottom = store.layer_paths(info)
    assert (bottom / "etc/a").read_text() == "a"
    assert (middle / "etc/odd").read_text() == "odd"
    assert stat.S_ISCHR((top / "etc/a").lstat().st_mode)


async def test_cancelling_leaves_nothing(
    registry: DockerRegistry, store: ImageStore, large: Image, tmp_path: Path
) -> None:
    registry.push("cancel", "v1", large)
    with anyio.CancelScope() as scope:
        await store.pull(
            f"{registry.host}/cancel:v1", progress=lambda step: scope.cancel() if step.phase == "download" else None
        )
    assert scope.cancelled_caught
    assert list((tmp_path / "images/tmp").iterdir()) == list((tmp_path / "images/layers").iterdir()) == []
    assert (await store.pull(f"{registry.host}/cancel:v1")).layers == tuple(large.diff_ids)
