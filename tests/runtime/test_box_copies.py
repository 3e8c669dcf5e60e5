"""Snapshots, clones, archives, volumes."""

from __future__ import annotations

import os
import random
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from hutch.errors import AlreadyExistsError, InvalidArgumentError, InvalidStateError, NotFoundError
from hutch.types import Mount
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import in_time, sh

if TYPE_CHECKING:
    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime

pytestmark = [pytest.mark.root, pytest.mark.anyio]


async def fill(box: LocalBox) -> str:
    """Make files of many kinds; returns what `contents` says of them."""
    script = (
        "mkdir -p /data/d && cd /data && echo one > f && ln f hard && ln -s f soft && chmod 4750 f && "
        "chown 1000:50 f && mkfifo fifo && "
        "echo deep > d/x && rm /etc/release && echo new > /etc/new && rm -r /var/tmp && mkdir /var/tmp"
    )
    result = await box.run(*sh(script))
    assert result.exit_code == 0, result.stderr
    return await contents(box)


async def contents(box: LocalBox) -> str:
    """A description of the files that `fill` made."""
    script = (
        "cd /data; stat -c '%n %F %a %u %g %h %s' f hard soft fifo d d/x; readlink soft; cat f d/x /etc/new; "
        "ls /etc/release /var/tmp 2>&1; ls /data"
    )
    return (await box.run(*sh(script))).text


@pytest.mark.parametrize("running", [True, False])
async def test_snapshot_and_restore(box: LocalBox, running: bool) -> None:
    with in_time(30):
        before = await fill(box)
        if not running:
            await box.stop()
        info = await box.snapshots.create("first")
        assert (info.name, info.box_id) == ("first", box.id)
        with pytest.raises(AlreadyExistsError):
            await box.snapshots.create("first")
        await box.start()
        await box.run(*sh("rm -r /data; echo later > /later"))
        await box.snapshots.create("second")
        with pytest.raises(InvalidStateError, match="runs"):
            await box.snapshots.restore("first")
        await box.stop()
        await box.snapshots.restore("first")
        await box.start()
        assert await contents(box) == before
        assert (await box.run("cat", "/later")).exit_code == 1
        await box.stop()
        await box.snapshots.restore(info.id)
        await box.snapshots.restore("second")
        await box.start()
        assert (await box.run(*sh("cat /later; ls /data"))).stdout == b"later\n"
        assert [s.name for s in await box.snapshots.list()] == ["first", "second"]
        await box.snapshots.remove("first")
        assert (await box.run("cat", "/later")).stdout == b"later\n"
        for action in (box.snapshots.get, box.snapshots.restore, box.snapshots.remove):
            with pytest.raises((NotFoundError, InvalidStateError)):
                await action("first")


async def test_an_interrupted_restore_is_finished_once(runtime: LocalRuntime, box: LocalBox) -> None:
    with in_time():
        await box.run(*sh("echo old > /f"))
        await box.stop()
        # As if the process had died right after the record was written.
        record = runtime.store.get_box(box.id)
        assert record is not None
        runtime.store.save_box(msgspec.structs.replace(record, reset_upper=True))
        await box.start()
        assert (await box.run("cat", "/f")).exit_code == 1
        await box.run(*sh("echo new > /f"))
        await box.restart()
        assert (await box.run("cat", "/f")).stdout == b"new\n", "the restore was done twice"


@pytest.mark.parametrize("running", [True, False])
async def test_a_clone_has_the_files_and_goes_its_own_way(runtime: LocalRuntime, box: LocalBox, running: bool) -> None:
    with in_time(30):
        before = await fill(box)
        if not running:
            await box.stop()
        clone = await box.clone("copy")
        assert (await clone.info()).pid is None
        assert clone.id != box.id
        with pytest.raises(AlreadyExistsError):
            await box.clone("copy")
        assert await contents(clone) == before
        await clone.run(*sh("echo changed > /data/f"))
        await box.start()
        assert await contents(box) == before
        await box.remove(force=True)
        assert (await clone.run("cat", "/data/f")).stdout == b"changed\n"
        await clone.restart()
        assert (await clone.run("cat", "/data/d/x")).stdout == b"deep\n"


async def test_export_and_import(runtime: LocalRuntime, tmp_path: Path) -> None:
    box = await runtime.create(IMAGE, env={"A": "kept"}, workdir="/tmp", labels={"l": "1"}, user="user")
    with in_time(30):
        result = await box.run(*sh("id -u"), user="root")
        assert result.stdout == b"0\n"
        await box.exec(*sh("true"), user="root")
        await box.run("mkdir", "/data", user="root")
        await box.run(*sh("echo mine > /tmp/mine; chmod 600 /tmp/mine"))
        await box.run("rm", "/etc/release", user="root")
        path = tmp_path / "box.tar"
        await box.export(path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        twin = await runtime.import_box(path, name="twin")
        info = await twin.info()
        assert (info.name, info.workdir, info.labels, info.user) == ("twin", "/tmp", {"l": "1"}, "user")
        result = await twin.run(*sh("echo $A; pwd; cat mine; stat -c '%a %u %g' mine; ls /etc/release /data"))
        assert result.stdout == b"kept\n/tmp\nmine\n600 1000 1000\n/data:\n"
        await box.remove(force=True)
        await twin.restart()
        assert (await twin.run("cat", "/tmp/mine")).stdout == b"mine\n"


async def test_a_tampered_archive_is_refused_and_leaves_nothing(
    runtime: LocalRuntime, box: LocalBox, tmp_path: Path
) -> None:
    await box.run(*sh("dd if=/dev/urandom of=/r bs=1k count=40 2>/dev/null"))
    path = tmp_path / "box.tar"
    await box.export(path)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        members = [(m.name, m.offset_data, m.size) for m in archive]
    assert len(members) >= 3
    disks = sorted(os.listdir(runtime.home.disks))
    chance = random.Random(11)
    positions = [(name, offset + chance.randrange(size)) for name, offset, size in members for _ in range(3)]
    accepted = []
    with in_time(40):
        for name, position in positions:
            forged = bytearray(whole)
            forged[position] ^= 1 << chance.randrange(8)
            path.write_bytes(forged)
            try:
                accepted.append((name, position, await runtime.import_box(path)))
            except InvalidArgumentError as error:
                assert str(path) in str(error)
        for cut in (0, 100, 1000, len(whole) // 2, len(whole) - 5000):
            path.write_bytes(whole[:cut])
            with pytest.raises(InvalidArgumentError):
                await runtime.import_box(path)
        with pytest.raises(InvalidArgumentError):
            await runtime.import_box(tmp_path / "absent")
    # The manifest has no digest of its own: a flipped byte in a name or time may leave a sound one. A layer never.
    assert [name for name, _, _ in accepted if name.startswith("layers/")] == []
    for _, _, imported in accepted:
        await imported.remove(force=True)
    assert sorted(os.listdir(runtime.home.disks)) == disks
    assert [info.id for info in await runtime.list()] == [box.id]


async def test_volumes_are_shared_and_outlive_boxes(runtime: LocalRuntime) -> None:
    volume = await runtime.volumes.create("data")
    with pytest.raises(AlreadyExistsError):
        await runtime.volumes.create("data")
    mount = Mount(target="/mnt/v", volume="data")
    with in_time():
        first = await runtime.create(IMAGE, mounts=[mount])
        assert (await first.run(*sh("echo shared > /mnt/v/f"))).exit_code == 0
        second = await runtime.create(IMAGE, mounts=[Mount(target="/v", volume="data", read_only=True)])
        assert (await second.run("cat", "/v/f")).stdout == b"shared\n"
        denied = await second.run(*sh("echo x > /v/f"))
        assert denied.exit_code != 0
        assert b"ead-only" in denied.stderr
        with pytest.raises(InvalidStateError, match="used"):
            await runtime.volumes.remove("data")
        await first.remove(force=True)
        await second.remove(force=True)
        third = await runtime.create(IMAGE, mounts=[mount])
        assert (await third.run("cat", "/mnt/v/f")).stdout == b"shared\n"
        await third.remove(force=True)
        assert [v.name for v in await runtime.volumes.list()] == ["data"]
        await runtime.volumes.remove("data")
        assert not runtime.home.volume(volume.id).exists()
        with pytest.raises(NotFoundError):
            await runtime.create(IMAGE, mounts=[mount])


async def test_host_folders_read_only_and_writable(runtime: LocalRuntime, tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    (tmp_path / "ro/f").write_text("host\n")
    (tmp_path / "ro/d").mkdir(mode=0o777)
    (tmp_path / "ro/d").chmod(0o777)
    (tmp_path / "rw").mkdir()
    (tmp_path / "rw").chmod(0o777)
    for part in (tmp_path, *tmp_path.parents):
        if part != Path("/tmp") and part != Path("/"):
            part.chmod(part.stat().st_mode | 0o111)
    box = await runtime.create(
        IMAGE,
        mounts=[
            Mount(target="/ro", source=str(tmp_path / "ro"), read_only=True),
            Mount(target="/deep/er/rw", source=str(tmp_path / "rw")),
            Mount(target="/file", source=str(tmp_path / "ro/f"), read_only=True),
        ],
    )
    with in_time():
        result = await box.run(
            *sh(
                "cat /ro/f /file; echo box > /deep/er/rw/f; "
                "for p in /ro/x /ro/d/x /file; do echo x > $p && echo leak; done"
            )
        )
    assert result.stdout == b"host\nhost\n"
    assert result.stderr.count(b"ead-only") == 3
    assert (tmp_path / "rw/f").read_text() == "box\n"
    assert (tmp_path / "ro/f").read_text() == "host\n"


@pytest.mark.parametrize(
    "mount",
    [
        Mount(target="/x", source="/no/such/folder"),
        Mount(target="relative", source="/tmp"),
        Mount(target="/", source="/tmp"),
        Mount(target="/a/../b", source="/tmp"),
        Mount(target="/x"),
        Mount(target="/x", source="/tmp", volume="v1"),
        Mount(target="/x", volume="../evil"),
    ],
)
async def test_impossible_mounts_are_refused(runtime: LocalRuntime, mount: Mount) -> None:
    with pytest.raises((InvalidArgumentError, NotFoundError)):
        await runtime.create(IMAGE, mounts=[mount])
    assert await runtime.list() == []
