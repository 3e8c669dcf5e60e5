"""`box-agent unpack`: archives as they should be, compared with GNU tar and with what was put in."""

from __future__ import annotations

import io
import os
import stat
import struct
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from pathlib import Path

    from tests.tar.conftest import Tool

pytestmark = pytest.mark.root

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service=ep, vfs_cap_data version 2
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def _gnu(data: bytes, where: Path) -> None:
    where.mkdir()
    command = ["tar", "-x", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-p", "-C", str(where)]
    subprocess.run(command, input=data, check=True, timeout=30)


def _sample(tool: Tool, form: int) -> bytes:
    make, part = tool.member, "a-rather-long-name-of-a-folder"
    long = "/".join([part] * 4)
    pax = form == tarfile.PAX_FORMAT
    extra = {"SCHILY.xattr.user.note": "value", "SCHILY.xattr.security.capability": CAPABILITY.decode("latin-1")}
    parts: list[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]] = [
        make(".", tarfile.DIRTYPE, mode=0o755, mtime=1_000_000_000),
        make("dir", tarfile.DIRTYPE, mode=0o3770, uid=12, gid=34, mtime=1_600_000_000.25 if pax else 1_600_000_000),
        (make("dir/file", uid=1000, gid=1001, mode=0o4755, mtime=1_500_000_000.5 if pax else 1), b"x" * 70_000),
        make("dir/link", tarfile.SYMTYPE, "../empty", uid=7, gid=8, mtime=99),
        (make("empty", mode=0), b""),
        *(make("/".join([part] * depth), tarfile.DIRTYPE) for depth in range(1, 5)),
        (make(f"{long}/leaf"), b"deep"),
        make("hard", tarfile.LNKTYPE, "dir/file"),
        make("fifo", tarfile.FIFOTYPE, mode=0o666, mtime=5),
        make("null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        make("disk", tarfile.BLKTYPE, devmajor=259, devminor=300, mode=0o660, gid=6),
    ]
    if form != tarfile.USTAR_FORMAT:
        parts += [
            (make("n" * 255), b"long name"),
            make("long-link", tarfile.SYMTYPE, "t/" * 300),
            (make("old", mtime=-5), b""),
            (make("big-id", uid=3_000_000, gid=4_000_000_000), b""),
        ]
    if pax:
        parts.append((make("noted", pax_headers=extra), b"with attributes"))
        parts.append((make("ümlaut-\udcff", mtime=-1.5), b"\xff"))
    return tool.archive(*parts, form=form)


@pytest.mark.parametrize("form", FORMATS)
def test_like_gnu_tar(tool: Tool, dest: Path, tmp_path: Path, form: int) -> None:
    data = _sample(tool, form)
    if form == tarfile.PAX_FORMAT:  # tarfile writes text values as UTF-8; attributes are bytes
        utf8 = CAPABILITY.decode("latin-1").encode()
        assert utf8 == CAPABILITY  # chosen so that both are the same
    entries, _ = tool.unpack(data, dest)
    _gnu(data, tmp_path / "other")
    assert tool.tree(dest) == tool.tree(tmp_path / "other")
    assert entries == len(tool.tree(dest))


@pytest.mark.parametrize(
    "shape", [["--format=gnu"], *(["--format=posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))]
)
@pytest.mark.parametrize("pieces", [0, 1, 3, 60])
def test_sparse(tool: Tool, dest: Path, tmp_path: Path, shape: list[str], pieces: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with source.joinpath("file").open("wb") as file:
        for index in range(pieces):
            file.seek(index * 131_072 + 4096)
            file.write(bytes([index + 1]) * 5000)
        file.truncate(20_000_000)
    os.utime(source / "file", (9, 9))
    data = subprocess.run(["tar", "-cS", *shape, "-C", source, "file"], check=True, capture_output=True).stdout
    assert len(data) < 2_000_000
    assert tool.unpack(data, dest) == (1, 20_000_000)
    assert tool.tree(dest)["file"] == tool.tree(source)["file"]
    assert dest.joinpath("file").stat().st_blocks * 512 < 2_000_000


def test_xattr_values_are_bytes(tool: Tool, dest: Path) -> None:
    value = bytes(range(256))
    record = b"SCHILY.xattr.user.b=" + value + b"\n"
    length = len(record) + 4
    body = f"{length} ".encode() + record
    plain = tool.archive((tool.member("f"), b""), form=tarfile.USTAR_FORMAT)
    header = tool.archive((tool.member("x"), body), form=tarfile.USTAR_FORMAT)
    header = _retype(header[: 512 * (1 + -(-len(body) // 512))], b"x")
    tool.unpack(header + plain, dest)
    assert os.getxattr(dest / "f", "user.b") == value


def _retype(data: bytes, kind: bytes) -> bytes:
    block = bytearray(data[:512])
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + data[512:]


def test_global_header(tool: Tool, dest: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers={"comment": "x", "uid": "77", "mtime": "12.5"}) as tar:
        tar.addfile(tool.member("a"))
        tar.addfile(tool.member("b", pax_headers={"uid": "78"}))
    tool.unpack(out.getvalue(), dest)
    assert dest.joinpath("a").stat().st_uid == 77
    assert dest.joinpath("a").stat().st_mtime_ns == 12_500_000_000
    assert dest.joinpath("b").stat().st_uid == 78


def test_later_members_replace(tool: Tool, dest: Path) -> None:
    make = tool.member
    data = tool.archive(
        make("d", tarfile.DIRTYPE),
        (make("d/x"), b"gone"),
        (make("keep"), b"old"),
        make("alias", tarfile.LNKTYPE, "keep"),
        make("d", tarfile.SYMTYPE, "elsewhere"),
        (make("keep"), b"new"),
        make("elsewhere", tarfile.DIRTYPE),
        (make("d/through"), b"link"),
        make("d", tarfile.DIRTYPE, mode=0o711),
        (make("d/again"), b"!"),
        make("d", tarfile.DIRTYPE, mode=0o700, mtime=44),
    )
    tool.unpack(data, dest)
    assert dest.joinpath("keep").read_bytes() == b"new"
    assert dest.joinpath("alias").read_bytes() == b"old"
    assert dest.joinpath("elsewhere/through").read_bytes() == b"link"
    assert sorted(path.name for path in dest.joinpath("d").iterdir()) == ["again"]
    assert stat.S_IMODE(dest.joinpath("d").stat().st_mode) == 0o700
    assert dest.joinpath("d").stat().st_mtime == 44


def test_hard_link_to_itself_keeps_the_file(tool: Tool, dest: Path) -> None:
    tool.unpack(tool.archive((tool.member("a"), b"data"), tool.member("a", tarfile.LNKTYPE, "./a")), dest)
    assert dest.joinpath("a").read_bytes() == b"data"


def test_names_are_made_relative(tool: Tool, dest: Path) -> None:
    tool.unpack(tool.archive((tool.member("/abs//./file"), b"1"), (tool.member("./x/"), b"")), dest)
    assert dest.joinpath("abs/file").read_bytes() == b"1"


def test_special_modes_survive_the_umask(tool: Tool, dest: Path) -> None:
    data = tool.archive(
        tool.member("p", tarfile.FIFOTYPE, mode=0o666), tool.member("d/e", tarfile.DIRTYPE, mode=0o1777)
    )
    tool.unpack(data, dest, umask=0o077)
    assert stat.S_IMODE(dest.joinpath("p").stat().st_mode) == 0o666
    assert stat.S_IMODE(dest.joinpath("d").stat().st_mode) == 0o755
    assert stat.S_IMODE(dest.joinpath("d/e").stat().st_mode) == 0o1777


def test_missing_end_blocks(tool: Tool, dest: Path) -> None:
    data = tool.archive((tool.member("a"), b"1" * 512), form=tarfile.USTAR_FORMAT)
    assert tool.unpack(data[:1024], dest) == (1, 512)
    assert tool.unpack(bytes(1024), dest) == (0, 0)


def test_what_follows_the_archive_is_read(tool: Tool, dest: Path) -> None:
    assert tool.unpack(tool.archive(tool.member("a")) + os.urandom(3_000_000), dest) == (1, 0)


# -- layers


def _is_whiteout(path: Path) -> bool:
    info = path.lstat()
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == 0


@pytest.mark.parametrize("flag", ["", "--userxattr"])
def test_whiteouts(tool: Tool, dest: Path, flag: str) -> None:
    make, key = tool.member, "user.overlay.opaque" if flag else "trusted.overlay.opaque"
    data = tool.archive(
        make("d", tarfile.DIRTYPE),
        (make("d/.wh.gone"), b""),
        (make("d/mine"), b"kept"),
        (make("d/.wh..wh..opq"), b""),
        (make("d/.wh.mine"), b""),
        (make("made/by/.wh." + "n" * 255), b""),
        (make(".wh.turned"), b""),
        (make("turned/into/folder"), b""),
        (make(".wh.dir"), b""),
        make("dir", tarfile.DIRTYPE),
        make("later", tarfile.DIRTYPE),
        (make(".wh.later"), b""),
        (make(".wh.file"), b""),
        (make("file"), b"file"),
        (make(".wh..wh.plnk/1.2"), b""),
        (make(".wh..wh.aufs"), b""),
    )
    tool.unpack(data, dest, "--layer", *([flag] if flag else []))
    assert _is_whiteout(dest / "d/gone")
    assert _is_whiteout(dest / "made/by" / ("n" * 255))
    assert dest.joinpath("d/mine").read_bytes() == b"kept"
    assert dest.joinpath("file").read_bytes() == b"file"
    for name in ("d", "turned", "dir", "later"):
        assert os.getxattr(dest / name, key) == b"y"
    assert key not in os.listxattr(dest / "made")
    assert not [path for path in dest.rglob("*") if path.name.startswith(".wh.")]


def test_whiteouts_are_plain_files_without_layer(tool: Tool, dest: Path) -> None:
    tool.unpack(tool.archive((tool.member(".wh.x"), b""), (tool.member(".wh..wh..opq"), b"")), dest)
    assert sorted(path.name for path in dest.iterdir()) == [".wh..wh..opq", ".wh.x"]


def test_whiteouts_work_in_an_overlay(tool: Tool, tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged", "top"):
        tmp_path.joinpath(name).mkdir()
    make = tool.member
    tool.unpack(
        tool.archive((make("a/old"), b""), (make("b"), b""), (make("c/x"), b""), (make("k"), b"")), tmp_path / "lower"
    )
    layer = tool.archive(
        (make("a/.wh..wh..opq"), b""), (make("a/new"), b""), (make(".wh.b"), b""), (make(".wh.c"), b"")
    )
    tool.unpack(layer, tmp_path / "top", "--layer")
    options = f"lowerdir={tmp_path}/top:{tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, tmp_path / "merged"], check=True)
    try:
        names = sorted(str(path.relative_to(tmp_path / "merged")) for path in tmp_path.joinpath("merged").rglob("*"))
    finally:
        subprocess.run(["umount", tmp_path / "merged"], check=True)
    assert names == ["a", "a/new", "k"]


# -- other users


@pytest.fixture
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an ordinary user, who can reach it."""
    path = tmp_path_factory.mktemp("shared")
    for folder in (path, *path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o711)
    os.chown(path, 65534, 65534)
    return path


@pytest.mark.parametrize("layer", [False, True])
def test_as_an_ordinary_user(tool: Tool, shared: Path, layer: bool) -> None:
    make = tool.member
    data = tool.archive(
        make("d", tarfile.DIRTYPE, uid=5, gid=6, mode=0o500),
        (make("d/f", uid=1000, gid=1000, mode=0o4711, mtime=3), b"x"),
        make("s", tarfile.SYMTYPE, "/etc/passwd", uid=9),
        make("null", tarfile.CHRTYPE, devmajor=1, devminor=3),
        (make(".wh.gone"), b""),
    )
    flags = ["--layer", "--userxattr"] if layer else []
    assert tool.unpack(data, shared, "--single-id", *flags, user=65534, group=65534, extra_groups=[]) == (5, 1)
    found = tool.tree(shared)
    assert {entry.uid for entry in found.values()} == {65534}
    assert found["d"].mode == 0o500
    assert found["d/f"].mode == 0o4711
    assert "null" not in found
    assert _is_whiteout(shared / "gone") if layer else (shared / ".wh.gone").exists()


def test_owner_that_is_not_mapped_is_named(tool: Tool, shared: Path) -> None:
    data = tool.archive((tool.member("f", uid=1000, gid=1000), b""))
    done = tool.run("unpack", "--dest", shared, stdin=data, user=65534, group=65534, extra_groups=[])
    assert done.returncode == 1
    assert done.stderr == b"f: cannot set the owner 1000:1000: Invalid argument\n"


# -- anything

_names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=90).filter(
    lambda name: name not in (".", "..") and len(name.encode()) <= 255
)


@st.composite
def _members(draw: st.DrawFn) -> list[tuple[tarfile.TarInfo, bytes]]:
    made: list[tuple[tarfile.TarInfo, bytes]] = []
    folders = [""]
    for name in draw(st.lists(_names, min_size=1, max_size=8, unique=True)):
        info = tarfile.TarInfo(draw(st.sampled_from(folders)) + name)
        info.type = draw(st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]))
        info.mode = draw(st.integers(0, 0o7777))
        info.uid, info.gid = draw(st.integers(0, 2**32 - 2)), draw(st.integers(0, 70000))
        info.mtime = draw(st.integers(-(2**31), 2**33))
        data = b""
        if info.isdir():
            folders.append(info.name + "/")
        elif info.issym():
            info.linkname = draw(_names)
        elif info.isreg():
            data = draw(st.binary(max_size=2000))
            info.size = len(data)
        made.append((info, data))
    return made


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=_members(), form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_what_goes_in_comes_out(
    tool: Tool, tmp_path_factory: pytest.TempPathFactory, members: list[tuple[tarfile.TarInfo, bytes]], form: int
) -> None:
    where = tmp_path_factory.mktemp("any")
    tool.unpack(tool.archive(*members, form=form), where)
    for info, data in members:
        path = where / info.name
        got = path.lstat()
        assert (got.st_uid, got.st_gid, int(got.st_mtime)) == (info.uid, info.gid, info.mtime)
        if not info.issym():
            assert stat.S_IMODE(got.st_mode) == info.mode
        if info.isreg():
            assert path.read_bytes() == data
        if info.issym():
            assert str(path.readlink()) == info.linkname
    again = where.parent / f"{where.name}-again"
    again.mkdir()
    tool.unpack(tool.pack(where), again)
    assert tool.tree(again) == tool.tree(where)
