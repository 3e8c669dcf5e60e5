"""Files of a box, and that nothing in a box decides what is written on the host."""

from __future__ import annotations

import io
import os
import random
import resource
import stat
import tarfile
from typing import TYPE_CHECKING

import pytest

from hutch.errors import (
    AlreadyExistsError,
    HutchError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
)
from hutch.host.untar import extract_below
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import in_time, sh

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime

MIB = 1 << 20
CONTENTS = {
    "empty": b"",
    "every byte": bytes(range(256)) * 3,
    "four mebibytes": random.Random(5).randbytes(4 * MIB),
    "block": bytes(512),
    "odd": b"x" * 1023,
}


def tree(path: Path) -> dict[str, tuple[str, int, bytes]]:
    """Everything below a folder: type, mode and content or target."""
    found = {}
    for item in sorted(path.rglob("*")):
        mode = stat.S_IMODE(item.lstat().st_mode)
        if item.is_symlink():
            found[str(item.relative_to(path))] = ("link", 0, os.fsencode(item.readlink()))
        elif item.is_dir():
            found[str(item.relative_to(path))] = ("dir", mode, b"")
        else:
            found[str(item.relative_to(path))] = ("file", mode, item.read_bytes())
    return found


@pytest.mark.root
@pytest.mark.anyio
async def test_read_and_write_are_exact(box: LocalBox) -> None:
    with in_time(30):
        for number, data in enumerate(CONTENTS.values()):
            for mode in (0o644, 0o600, 0o755):
                await box.files.write(f"/tmp/f{number}", data, mode=mode)
                assert await box.files.read(f"/tmp/f{number}") == data
                info = await box.files.stat(f"/tmp/f{number}")
                assert (info.type, info.mode, info.size, info.uid) == ("file", mode, len(data), 0)
        await box.files.write("/a/b/c/d/e/text", "héllo")
        assert (await box.run("cat", "/a/b/c/d/e/text")).stdout == "héllo".encode()
        assert (await box.files.stat("/a/b/c/d/e")).type == "directory"
        await box.files.write("/tmp/ with\nodd 'name'*", b"x")
        assert await box.files.read("/tmp/ with\nodd 'name'*") == b"x"


@pytest.mark.root
@pytest.mark.anyio
async def test_list_and_stat_tell_every_type(box: LocalBox) -> None:
    await box.run(
        *sh("mkdir /t && cd /t && mkdir d && echo x > f && ln -s f l && ln -s nowhere b && mkfifo p && chmod 4711 f")
    )
    with in_time():
        found = {info.name: info for info in await box.files.list("/t")}
        assert {name: info.type for name, info in found.items()} == {
            "d": "directory", "f": "file", "l": "symlink", "b": "symlink", "p": "fifo",
        }  # fmt: skip
        assert (found["l"].target, found["f"].target, found["f"].mode, found["f"].size) == ("f", None, 0o4711, 2)
        assert [i.name for i in await box.files.list("/t")] == sorted(found)
        assert (await box.files.stat("/t/l")).type == "symlink"
        assert (await box.files.stat("/dev/null")).type == "char"
        assert await box.files.read("/t/l") == b"x\n"


@pytest.mark.root
@pytest.mark.anyio
async def test_errors_name_the_path(box: LocalBox, tmp_path: Path) -> None:
    with in_time():
        for action in (
            lambda: box.files.read("/no/such"),
            lambda: box.files.stat("/no/such"),
            lambda: box.files.list("/no/such"),
            lambda: box.files.get("/no/such", tmp_path),
            lambda: box.files.put(tmp_path / "absent", "/tmp/"),
            lambda: box.files.get("/etc", tmp_path / "no such" / "x"),
        ):
            with pytest.raises(NotFoundError, match=r"such|absent"):
                await action()
        for action in (
            lambda: box.files.read("/etc"),
            lambda: box.files.list("/etc/passwd"),
            lambda: box.files.write("/etc/", b""),
            lambda: box.files.write("/etc", b""),
            lambda: box.files.write("/etc/passwd/x", b""),
            lambda: box.files.read("a\0b"),
            lambda: box.files.read(""),
        ):
            with pytest.raises(InvalidArgumentError):
                await action()
        await box.files.write("/tmp/big", bytes(2000))
        with pytest.raises(ResourceExhaustedError):
            await box.files.read("/tmp/big", max_bytes=1999)
        assert len(await box.files.read("/tmp/big", max_bytes=2000)) == 2000
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.root
@pytest.mark.anyio
async def test_operations_run_as_the_box_user(runtime: LocalRuntime) -> None:
    box = await runtime.create(IMAGE, user="user", workdir="/home/user")
    with in_time():
        await box.files.write("mine", b"1")
        info = await box.files.stat("/home/user/mine")
        assert (info.uid, info.gid) == (1000, 1000)
        for action in (
            lambda: box.files.write("/etc/passwd", b""),
            lambda: box.files.write("/root/x", b""),
            lambda: box.files.list("/root"),
        ):
            with pytest.raises(PermissionDeniedError):
                await action()


@pytest.mark.root
@pytest.mark.anyio
async def test_put_and_get_keep_a_tree(box: LocalBox, tmp_path: Path) -> None:
    source = tmp_path / "source"
    deep = source / "1/2/3/4/5"
    deep.mkdir(parents=True)
    for number, data in enumerate(CONTENTS.values()):
        (deep / f"f{number}").write_bytes(data)
        (deep / f"f{number}").chmod(0o640 + number)
    (source / "link").symlink_to("1/2")
    (source / "absolute").symlink_to("/etc/passwd")
    (source / "dangling").symlink_to("nowhere")
    (source / "1").chmod(0o700)
    (source / "readonly").mkdir()
    (source / "readonly/f").write_bytes(b"x")
    (source / "readonly").chmod(0o555)
    with in_time(30):
        await box.files.put(source, "/tmp/")
        await box.files.put(source, "/srv/copy")
        await box.files.get("/tmp/source", tmp_path / "back")
        (tmp_path / "into").mkdir()
        await box.files.get("/srv/copy", tmp_path / "into")
        assert tree(tmp_path / "back") == tree(source)
        assert tree(tmp_path / "into/copy") == tree(source)
        await box.files.put(source / "absolute", "/tmp/followed", follow_symlinks=True)
        assert b"root" in await box.files.read("/tmp/followed")
        # Again, over what is there.
        await box.files.put(source, "/tmp/")
        await box.files.get("/tmp/source", tmp_path / "into")
        await box.files.get("/tmp/source", tmp_path / "into")
        assert tree(tmp_path / "into/source") == tree(source)
        with pytest.raises(AlreadyExistsError):
            await box.files.put(source, "/tmp/", overwrite=False)
        with pytest.raises(AlreadyExistsError):
            await box.files.get("/tmp/source", tmp_path / "into", overwrite=False)
    (source / "readonly").chmod(0o755)
    for copy in ("back", "into/copy", "into/source"):
        (tmp_path / copy / "readonly").chmod(0o755)


@pytest.mark.root
@pytest.mark.anyio
async def test_a_sparse_gibibyte_needs_no_memory(box: LocalBox, tmp_path: Path) -> None:
    await box.run(*sh("dd if=/dev/zero of=/tmp/big bs=1 count=0 seek=1G 2>/dev/null; echo end >> /tmp/big"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with in_time(50):
        await box.files.get("/tmp/big", tmp_path / "big")
    info = (tmp_path / "big").stat()
    assert info.st_size == (1 << 30) + 4
    assert info.st_blocks * 512 < 64 * MIB, "the holes were filled"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # in KiB
    with (tmp_path / "big").open("rb") as file:
        file.seek(1 << 30)
        assert file.read() == b"end\n"


@pytest.mark.root
@pytest.mark.anyio
async def test_a_box_full_of_traps_cannot_write_elsewhere(box: LocalBox, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    target = tmp_path / "target"
    target.mkdir()
    script = f"""
        mkdir -p /t/d && cd /t
        ln -s {outside} escape && ln -s / root && ln -s ../.. up
        ln -s {outside}/planted file
        mkfifo fifo; mknod null c 1 3 2>/dev/null
        echo x > 'd/..'x; echo y > '-rf'; chmod 6777 ./-rf
    """
    with in_time():
        await box.run(*sh(script))
        await box.files.get("/t", target)
        await box.files.get("/t", target)
    assert list(outside.iterdir()) == []
    assert (target / "t/escape").is_symlink()
    assert stat.S_IMODE((target / "t/-rf").stat().st_mode) == 0o777, "set-id bits stay in the box"
    assert not (target / "t/fifo").exists()
    # The host's own symlinks in the target are not followed either.
    (target / "t/d").rename(target / "t/d2")
    (target / "t/d").symlink_to(outside)
    with in_time():
        await box.files.get("/t", target)
    assert list(outside.iterdir()) == []


def member(
    name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", data: bytes = b"x"
) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of a forged stream."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    info.mode = 0o7777
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    return info, data


DIR, LINK, HARD = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


@pytest.mark.parametrize(
    "members",
    [
        [member("../outside/x")],
        [member("/outside/x")],
        [member("a/../../outside/x")],
        [member("d", DIR), member("../outside/x")],
        [member("d", DIR), member("d/../../outside/x")],
        [member("d", DIR), member("d/l", LINK, link="../../outside"), member("d/l/x")],
        [member("d", DIR), member("d/l", LINK, link="/"), member("d/l/tmp/x")],
        [member("d", LINK, link="../outside"), member("d/x")],
        [member("d", DIR), member("d/h", HARD, link="../outside/secret")],
        [member("d", DIR), member("d/h", HARD, link="/etc/passwd")],
        [
            member("d", DIR),
            member("d/l", LINK, link="../../outside/secret"),
            member("d/h", HARD, link="d/l"),
            member("d/h"),
        ],
        [member("d", DIR), member("other/x")],
        [member("d", DIR), member("d/dev", tarfile.BLKTYPE), member("d/fifo", tarfile.FIFOTYPE)],
        [member("d/e", DIR)],
        [member("..", DIR), member("../outside/x")],
        [member(".", DIR), member("./../outside/x")],
        [member("d", DIR), member("d", LINK, link="../outside"), member("d", DIR), member("d/x")],
    ],
)
def test_a_forged_stream_cannot_write_elsewhere(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    target.mkdir()
    (outside / "secret").write_bytes(b"secret")
    before = tree(outside)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    try:
        with tarfile.open(fileobj=buffer, mode="r|") as stream:
            extract_below(stream, target, "new")
    except (HutchError, OSError):
        pass
    assert tree(outside) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["outside", "target"]
    assert [p.name for p in target.iterdir()] in ([], ["new"])
    for item in target.rglob("*"):
        mode = item.lstat().st_mode
        assert stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
        assert not mode & 0o7000 or stat.S_ISLNK(mode)
        assert not stat.S_ISREG(mode) or item.lstat().st_ino != (outside / "secret").stat().st_ino
