"""`box-agent pack`: what GNU tar and Python make of it, and the way back."""

from __future__ import annotations

import io
import os
import socket
import stat
import struct
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.tar.conftest import Tool

pytestmark = pytest.mark.root

BASE = 1_000_000
CAPABILITY_V2 = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
CAPABILITY_V3 = struct.pack("<IIIIII", 0x03000001, 1 << 13, 0, 0, 0, BASE)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree with one of everything."""
    root = tmp_path / "source"
    root.joinpath("dir/sub").mkdir(parents=True)
    root.joinpath("dir/file").write_bytes(b"content" * 1000)
    root.joinpath("dir/file").chmod(0o4755)
    root.joinpath("a-link").hardlink_to(root / "dir/file")
    root.joinpath("empty").touch()
    root.joinpath("bad \xff\n name").write_bytes(b"")
    root.joinpath("n" * 255).write_bytes(b"long")
    root.joinpath("dir/sub/symlink").symlink_to("t" * 300)
    root.joinpath("absolute").symlink_to("/etc/passwd")
    root.joinpath("to-symlink").hardlink_to(root / "absolute")
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "device", 0o660 | stat.S_IFBLK, os.makedev(8, 300))
    os.chown(root / "empty", 4_000_000_000, 3_000_000)
    os.utime(root / "empty", ns=(0, -1_500_000_001))
    os.utime(root / "dir", ns=(0, 1_234_567_890_123_456_789))
    os.setxattr(root / "empty", "user.bytes", bytes(range(256)))
    os.setxattr(root / "dir", "user.empty", b"")
    os.setxattr(root / "n".ljust(255, "n"), "security.capability", CAPABILITY_V2)
    return root


def _contents(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {info.name: info for info in tar.getmembers()}


def test_round_trip(tool: Tool, dest: Path, source: Path) -> None:
    data = tool.pack(source)
    tool.unpack(data, dest)
    assert tool.tree(dest) == tool.tree(source)


def test_gnu_tar_reads_it(tool: Tool, dest: Path, source: Path) -> None:
    command = ["tar", "-x", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-p", "-C", str(dest)]
    done = subprocess.run(command, input=tool.pack(source), check=True, timeout=30, capture_output=True)
    ours, theirs = tool.tree(source), tool.tree(dest)
    assert b"unknown" not in done.stderr
    # GNU tar touches a directory again when it makes a hard link in it late.
    assert {name for name in ours if ours[name] != theirs.get(name)} <= {"."}


def test_deterministic_and_sorted(tool: Tool, source: Path) -> None:
    data = tool.pack(source)
    assert data == tool.pack(source)
    names = list(_contents(data))
    assert names[0] == "."
    assert names[1:] == sorted(names[1:], key=lambda name: os.fsencode(name).split(b"/"))


def test_sockets_are_left_out(tool: Tool, source: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        where = os.open(source, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{where}/socket")
        os.close(where)
        assert "socket" not in _contents(tool.pack(source))


@pytest.mark.parametrize("pieces", [0, 1, 50])
def test_sparse_files_stay_small(tool: Tool, dest: Path, tmp_path: Path, pieces: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with source.joinpath("file").open("wb") as file:
        for index in range(pieces):
            file.seek(index << 30)
            file.write(b"piece" * 100)
        file.truncate(1 << 40)
    data = tool.pack(source)
    assert len(data) < 1_000_000
    tool.unpack(data, dest)
    unpacked = dest / "file"
    assert unpacked.stat().st_size == 1 << 40
    assert unpacked.stat().st_blocks <= source.joinpath("file").stat().st_blocks + 8
    with unpacked.open("rb") as file:
        for index in range(pieces):
            file.seek(index << 30)
            assert file.read(501) == b"piece" * 100 + b"\0"
    listed = subprocess.run(["tar", "-tv"], input=data, check=True, capture_output=True).stdout
    assert str(1 << 40).encode() in listed
    assert _contents(data)["file"].size == 1 << 40


def test_shift(tool: Tool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    source.joinpath("f").touch()
    for path, uid, gid in ((source, BASE, BASE), (source / "f", BASE + 65535, BASE + 33)):
        os.chown(path, uid, gid)
    os.setxattr(source / "f", "security.capability", CAPABILITY_V3)
    found = _contents(tool.pack(source, "--shift", str(BASE)))
    assert (found["."].uid, found["."].gid) == (0, 0)
    assert (found["f"].uid, found["f"].gid) == (65535, 33)
    assert os.fsencode(found["f"].pax_headers["SCHILY.xattr.security.capability"]) == CAPABILITY_V2
    assert "SCHILY.xattr.security.capability" not in _contents(tool.pack(source))["f"].pax_headers


@pytest.mark.parametrize("owner", [0, BASE - 1, BASE + 65536])
def test_shift_refuses_other_owners(tool: Tool, tmp_path: Path, owner: int) -> None:
    source = tmp_path / "source"
    source.mkdir()
    os.chown(source, BASE, owner)
    done = tool.run("pack", "--source", source, "--shift", str(BASE))
    assert done.returncode == 1
    assert done.stderr.startswith(b".: owner %d is not one" % owner)


@pytest.mark.parametrize("flags", [[], ["--userxattr"]])
def test_layer_round_trip(tool: Tool, dest: Path, tmp_path: Path, flags: list[str]) -> None:
    source = tmp_path / "source"
    source.joinpath("opaque/inner").mkdir(parents=True)
    key = "user.overlay.opaque" if flags else "trusted.overlay.opaque"
    os.setxattr(source / "opaque", key, b"y")
    for name in ("gone", "opaque/gone", "n" * 255):
        os.mknod(source / name, stat.S_IFCHR, 0)
    os.setxattr(source / "opaque/inner", "trusted.overlay.origin", b"private")
    data = tool.pack(source, "--layer", *flags)
    found = _contents(data)
    assert set(found) == {
        ".", "opaque", "opaque/inner", "opaque/.wh..wh..opq", "opaque/.wh.gone", ".wh.gone", ".wh." + "n" * 255
    }  # fmt: skip
    assert all(found[name].isreg() and found[name].size == 0 for name in found if ".wh." in name)
    tool.unpack(data, dest, "--layer", *flags)
    os.removexattr(source / "opaque/inner", "trusted.overlay.origin")
    ours, theirs = tool.tree(source), tool.tree(dest)
    for trees in (ours, theirs):  # whiteouts have no times and modes of their own
        for name, entry in trees.items():
            if stat.S_ISCHR(entry.kind):
                trees[name] = entry._replace(mtime_ns=0, mode=0, first="")
    assert ours == theirs


@pytest.mark.parametrize("note", ["redirect", "metacopy"])
def test_layer_with_content_elsewhere_is_refused(tool: Tool, tmp_path: Path, note: str) -> None:
    source = tmp_path / "source"
    source.joinpath("d").mkdir(parents=True)
    os.setxattr(source / "d", f"trusted.overlay.{note}", b"/x")
    done = tool.run("pack", "--source", source, "--layer")
    assert done.returncode == 1
    assert b"d: content lies in a lower layer" in done.stderr


def test_layer_with_a_reserved_name_is_refused(tool: Tool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.joinpath("d").mkdir(parents=True)
    source.joinpath("d/.wh.etc").touch()
    done = tool.run("pack", "--source", source, "--layer")
    assert done.returncode == 1
    assert b"d/.wh.etc: a layer cannot hold this name" in done.stderr


def test_full_disk_is_an_error(tool: Tool, source: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [tool.program, "pack", "--source", source],
            stdout=full,
            stderr=subprocess.PIPE,
            env={"ASAN_OPTIONS": "detect_leaks=0", "LC_ALL": "C"},
            timeout=20,
        )
    assert done.returncode == 1
    assert b"cannot write the archive: No space left on device" in done.stderr


def test_a_real_root(tool: Tool, dest: Path, tmp_path: Path) -> None:
    """The machine's own folders: many files, odd modes, hard links."""
    source = tmp_path / "source"
    source.mkdir()
    subprocess.run(["cp", "-a", "/etc", "/usr/share/perl5", source], check=True)
    tool.unpack(tool.pack(source), dest)
    assert tool.tree(dest) == tool.tree(source)
