"""The store: names, removal, collection, several at once, sudden death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import ImageError, InvalidArgumentError, InvalidStateError, NotFoundError
from hutch.image import ImageStore
from tests.registry import Exchange, HostileRegistry, Image, digest, entry, tar

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.image import RegistryConfig
    from hutch.types import Progress

pytestmark = [pytest.mark.anyio, pytest.mark.root]

PULL = """
import anyio, sys
from pathlib import Path
from hutch.image import ImageStore, RegistryConfig
async def main():
    store = ImageStore(Path(sys.argv[1]), config=RegistryConfig(docker_config=None))
    print((await store.pull(sys.argv[2])).digest)
anyio.run(main)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def filled(store: ImageStore, hostile: HostileRegistry, **images: Image) -> None:
    for name, image in images.items():
        hostile.add(name, "v1", image)
        await store.pull(f"{hostile.host}/{name}:v1")


async def test_removal_by_name(hostile: HostileRegistry, store: ImageStore, small: Image, tmp_path: Path) -> None:
    other = Image([small.layers[0], tar(entry("more", b"m"))])
    await filled(store, hostile, one=small, same=small, other=other)
    one, same = f"{hostile.host}/one:v1", f"{hostile.host}/same:v1"
    info = store.get(one)
    assert info.references == (one, same)
    assert len(store.list()) == 2
    used = {info.digest}
    assert await store.remove(one, in_use=used) == [one]
    assert store.get(same).digest == info.digest
    with pytest.raises(InvalidStateError, match=r"same:v1.*used by a box"):
        await store.remove(same, in_use=used)
    assert store.get(same).references == (same,)
    assert await store.remove(same) == [same, info.digest]
    with pytest.raises(NotFoundError):
        store.get(info.digest)
    # The layer that the other image shares stays.
    kept = [layer[7:] for layer in other.diff_ids]
    assert names(tmp_path / "images/layers") == sorted(kept)
    assert names(tmp_path / "images/tmp") == []
    with pytest.raises(NotFoundError):
        await store.remove(one)


async def test_removal_by_digest(hostile: HostileRegistry, store: ImageStore, small: Image) -> None:
    await filled(store, hostile, one=small, same=small)
    info = store.get(digest(small.config_blob)[7:17])
    assert await store.remove(info.digest[7:17]) == [*info.references, info.digest]
    assert store.list() == []


async def test_finding(hostile: HostileRegistry, store: ImageStore, small: Image) -> None:
    await filled(store, hostile, one=small)
    for text in ("", "abc", info_prefix(small, 5), "sha256:", "no/such:image", "A B", "f" * 64):
        with pytest.raises(NotFoundError):
            store.get(text)
    assert store.get(info_prefix(small, 6)).digest == digest(small.config_blob)
    assert store.get(digest(small.config_blob).upper().replace("SHA256", "sha256")).digest == digest(small.config_blob)


def info_prefix(image: Image, length: int) -> str:
    return digest(image.config_blob)[7 : 7 + length]


async def test_an_ambiguous_prefix(hostile: HostileRegistry, store: ImageStore, small: Image, tmp_path: Path) -> None:
    await filled(store, hostile, one=small)
    name = digest(small.config_blob)[7:]
    twin = name[:10] + "0" * 54
    record = (tmp_path / f"images/images/{name}.json").read_text()
    (tmp_path / f"images/images/{twin}.json").write_text(record.replace(name, twin))
    with pytest.raises(InvalidArgumentError, match="2 images"):
        store.get(name[:10])
    assert store.get(name[:12]).digest == digest(small.config_blob) or twin.startswith(name[:12])


async def test_pruning(hostile: HostileRegistry, store: ImageStore, small: Image, tmp_path: Path) -> None:
    newer = Image([tar(entry("new", b"n" * 1000))])
    await filled(store, hostile, app=small, kept=Image([tar(entry("kept", b"k" * 10))]))
    hostile.add("app", "v1", newer)
    await store.pull(f"{hostile.host}/app:v1", always=True)
    assert store.get(digest(small.config_blob)).references == ()
    assert await store.prune(in_use={digest(small.config_blob)}) == 0
    assert await store.prune() == sum(map(len, (b"gone", b"kept", b"hidden", b"new")))
    assert len(store.list()) == 2
    assert await store.prune(all=True, in_use={digest(newer.config_blob)}) == 10
    assert [info.digest for info in store.list()] == [digest(newer.config_blob)]
    assert await store.prune(all=True) == 1000
    assert store.list() == []
    images = tmp_path / "images"
    assert names(images / "layers") == names(images / "tmp") == names(images / "images") == []
    assert names(images / "locks") == ["index"]


async def test_pruning_spares_what_a_pull_counts_on(
    hostile: HostileRegistry, store: ImageStore, small: Image, tmp_path: Path
) -> None:
    """One layer is there, the next one comes: a prune in between takes neither."""
    hostile.add("app", "v1", small)
    go = threading.Event()

    def slow(exchange: Exchange) -> None:
        assert go.wait(10)
        hostile.honest(exchange)

    hostile.rules[digest(small.blobs[1])] = slow
    lower = anyio.Event()

    def listen(step: Progress) -> None:
        if step.phase == "done" and step.item == small.diff_ids[0]:
            lower.set()

    async with anyio.create_task_group() as group:
        group.start_soon(partial(store.pull, f"{hostile.host}/app:v1", progress=listen))
        with anyio.fail_after(10):
            await lower.wait()
            assert await store.prune(all=True) == 0
        go.set()
    assert all(path.is_dir() for path in store.layer_paths(store.get(f"{hostile.host}/app:v1")))


async def test_concurrent_pulls_share_the_work(
    hostile: HostileRegistry, store: ImageStore, large: Image, tmp_path: Path, config: RegistryConfig
) -> None:
    image = Image([*large.layers, tar(entry("b", os.urandom(1 << 20))), tar(entry("c", b"c"))])
    backwards = Image(image.layers[::-1])
    hostile.add("app", "v1", image)
    hostile.add("back", "v1", backwards)
    other = ImageStore(tmp_path / "images", config=config)
    command = [sys.executable, "-c", PULL, str(tmp_path / "images"), f"{hostile.host}/app:v1"]
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for puller in (store, other, store):
                group.start_soon(puller.pull, f"{hostile.host}/app:v1")
                group.start_soon(puller.pull, f"{hostile.host}/back:v1")
            done = [await anyio.run_process(command) for _ in range(2)]
    assert {run.stdout.decode().strip() for run in done} == {digest(image.config_blob)}
    for blob in image.blobs:
        assert len(hostile.asked(digest(blob))) == 1
    assert len(store.list()) == 2


async def test_sudden_death(
    hostile: HostileRegistry, store: ImageStore, large: Image, small: Image, tmp_path: Path
) -> None:
    image = Image([*small.layers, *large.layers])
    hostile.add("app", "v1", image)
    stuck = threading.Event()
    blob = image.blobs[-1]

    def half(exchange: Exchange) -> None:
        exchange.send_response(200)
        exchange.send_header("Content-Length", str(len(blob)))
        exchange.end_headers()
        exchange.wfile.write(blob[: len(blob) // 2])
        exchange.wfile.flush()
        stuck.wait(20)

    hostile.rules[digest(blob)] = half
    images = tmp_path / "images"
    command = [sys.executable, "-c", PULL, str(images), f"{hostile.host}/app:v1"]
    process = subprocess.Popen(command)
    try:
        with anyio.fail_after(20):
            while not list(images.glob("tmp/*/fs/data")) or len(list(images.glob("layers/*"))) < 2:
                assert process.poll() is None
                await anyio.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        stuck.set()
    assert store.list() == []
    del hostile.rules[digest(blob)]
    info = await store.pull(f"{hostile.host}/app:v1")
    assert (store.layer_paths(info)[0] / "data").stat().st_size == 4 << 20
    with anyio.fail_after(10):
        while names(images / "tmp"):  # the dead process's child may have needed a moment to end
            await store.prune()
    # The layers that were complete were not fetched again.
    assert [len(hostile.asked(digest(layer))) for layer in image.blobs] == [1, 1, 2]


async def test_damage_heals(hostile: HostileRegistry, store: ImageStore, small: Image, tmp_path: Path) -> None:
    """What a power cut may leave: empty small files."""
    await filled(store, hostile, app=small)
    reference = f"{hostile.host}/app:v1"
    info = store.get(reference)
    (tmp_path / f"images/images/{info.digest[7:]}.json").write_bytes(b"")
    (tmp_path / f"images/layers/{info.layers[0][7:]}/info").write_bytes(b"")
    (tmp_path / "images/images/.x.json.tmp").write_bytes(b"{")
    assert store.list() == []
    again = await store.pull(reference)
    assert (again.digest, again.layers, again.references) == (info.digest, info.layers, info.references)
    assert (store.layer_paths(info)[-1] / "etc/kept").read_bytes() == b"kept"
    await store.prune()
    assert names(tmp_path / "images/tmp") == []
    assert names(tmp_path / "images/images") == [f"{info.digest[7:]}.json"]


async def test_a_missing_layer_is_named(
    hostile: HostileRegistry, store: ImageStore, small: Image, tmp_path: Path
) -> None:
    await filled(store, hostile, app=small)
    info = store.get(f"{hostile.host}/app:v1")
    (tmp_path / "images/layers" / info.layers[0][7:]).rename(tmp_path / "away")
    with pytest.raises(ImageError, match="is missing; pull it again"):
        store.layer_paths(info)
    await store.pull(f"{hostile.host}/app:v1", always=True)
    assert len(store.layer_paths(info)) == 2


async def test_locks(store: ImageStore) -> None:
    disk = store._disk
    disk.prepare()
    first = disk.try_lock("a")
    assert first is not None
    with closing(first):
        assert disk.try_lock("a") is None
        assert disk.try_lock("a", shared=True) is None
    second, third = disk.try_lock("a", shared=True), disk.try_lock("a", shared=True)
    assert second is not None
    assert third is not None
    with closing(second), closing(third):
        assert disk.try_lock("a") is None
