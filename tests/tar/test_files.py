"""The file operations of a box: GET, PUT, STAT and LIST, run as they are in a box but without one."""

from __future__ import annotations

import io
import os
import resource
import stat
import subprocess
import tarfile
import threading
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.tar.conftest import Tool


def _members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {info.name: info for info in tar.getmembers()}


def _records(data: bytes) -> list[tuple[list[str], bytes, bytes]]:
    """Fields, name and target of each record."""
    assert data.endswith(b"\0")
    parts = data[:-1].split(b"\0")
    found = []
    for head, target in zip(parts[::2], parts[1::2], strict=True):
        *fields, name = head.split(b" ", 6)
        found.append(([field.decode() for field in fields], name, target))
    return found


# -- GET


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    root.joinpath("dir/sub").mkdir(parents=True)
    root.joinpath("dir/file").write_bytes(b"x" * 300_000)
    root.joinpath("dir/file").chmod(0o640)
    root.joinpath("dir/sub/hard").hardlink_to(root / "dir/file")
    root.joinpath("dir/link").symlink_to("file")
    root.joinpath("dir/dangling").symlink_to("/nowhere")
    root.joinpath("to-dir").symlink_to("dir")
    root.joinpath("to-file").symlink_to("dir/file")
    os.mkfifo(root / "dir/fifo")
    return root


def test_get_directory(tool: Tool, source: Path) -> None:
    done = tool.files("get", source / "dir")
    assert (done.returncode, done.stderr) == (0, b"")
    found = _members(done.stdout)
    assert list(found) == ["dir", "dir/dangling", "dir/fifo", "dir/file", "dir/link", "dir/sub", "dir/sub/hard"]
    assert found["dir/link"].linkname == "file"
    assert found["dir/sub/hard"].islnk()
    assert found["dir/sub/hard"].linkname == "dir/file"
    assert found["dir/fifo"].isfifo()
    assert (found["dir/file"].size, found["dir/file"].mode) == (300_000, 0o640)


@pytest.mark.parametrize(
    ("path", "first", "is_dir"),
    [
        ("to-dir", "to-dir", True),
        ("to-file", "to-file", False),
        ("dir/", "dir", True),
        ("dir/sub/..", ".", True),
        ("dir/file", "file", False),
    ],
)
def test_get_follows_the_path_itself(tool: Tool, source: Path, path: str, first: str, is_dir: bool) -> None:
    found = _members(tool.files("get", f"{source}/{path}").stdout)
    assert next(iter(found)) == first
    assert found[first].isdir() == is_dir


def test_get_unpacks_elsewhere(tool: Tool, source: Path, dest: Path) -> None:
    done = tool.files("put", dest, tool.files("get", source / "dir").stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    there = {f"dir/{name}" if name != "." else "dir": entry for name, entry in tool.tree(source / "dir").items()}
    here = {name: entry for name, entry in tool.tree(dest).items() if name != "."}
    assert {name: entry._replace(first="") for name, entry in here.items()} == {
        name: entry._replace(first="") for name, entry in there.items()
    }
    assert dest.joinpath("dir/file").samefile(dest / "dir/sub/hard")


@pytest.mark.parametrize("op", ["get", "put", "stat", "list"])
def test_absent(tool: Tool, tmp_path: Path, op: str) -> None:
    done = tool.files(op, tmp_path / "absent")
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.endswith(b"absent: No such file or directory\n")


def test_get_dangling(tool: Tool, source: Path) -> None:
    assert tool.files("get", source / "dir/dangling").returncode == 2


def test_get_a_file_that_shrinks(tool: Tool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 30_000_000)
    process = subprocess.Popen(
        [tool.program, "files", "1", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process, process.stdout, process.stderr:
        head = process.stdout.read(10_000)  # the rest of the file does not fit into the pipe: it is still being read
        os.truncate(path, 100_000)
        data = head + process.stdout.read()
        assert process.stderr.read() == b"file: changed while reading\n"
        assert process.wait(20) == 1
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        content = tar.extractfile("file")
        assert content is not None
        body = content.read()
    assert len(body) == 30_000_000
    assert body.rstrip(b"\0") == b"x" * len(body.rstrip(b"\0"))
    assert body.endswith(bytes(1_000_000))


@pytest.mark.root
def test_get_what_may_not_be_read(tool: Tool, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = _reachable(tmp_path_factory.mktemp("get"))
    root.joinpath("secret").write_bytes(b"secret")
    root.joinpath("secret").chmod(0o600)
    done = tool.files("get", root, user=65534, group=65534, extra_groups=[])
    assert done.returncode == 1
    assert done.stderr.endswith(b"/secret: cannot open: Permission denied\n")
    assert b"secret" * 2 not in done.stdout


def _reachable(path: Path) -> Path:
    for folder in (path, *path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o711)
    path.chmod(0o755)
    return path


# -- PUT


def test_put_merges_and_replaces(tool: Tool, dest: Path) -> None:
    make = tool.member
    dest.joinpath("d").mkdir(mode=0o750)
    dest.joinpath("d/other").write_bytes(b"stays")
    dest.joinpath("d/file").write_bytes(b"old")
    inode = dest.joinpath("d/file").stat().st_ino
    with dest.joinpath("d/file").open("rb") as reader:
        done = tool.files(
            "put",
            dest,
            tool.archive(
                make("d", tarfile.DIRTYPE, mode=0o777),
                (make("d/file", mode=0o600, mtime=12.25), b"new"),
                make("n", tarfile.DIRTYPE, mode=0o500, mtime=7),
                (make("n/f"), b"1"),
                make("n/l", tarfile.SYMTYPE, "../d/file"),
                make("n/h", tarfile.LNKTYPE, "d/file"),
                make("n/h", tarfile.LNKTYPE, "d/file"),
            ),
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert reader.read() == b"old"  # replaced, not overwritten
    assert dest.joinpath("d/file").stat().st_ino != inode
    assert dest.joinpath("d/file").read_bytes() == b"new"
    assert dest.joinpath("d/file").stat().st_mtime == 12.25
    assert dest.joinpath("d/file").samefile(dest / "n/h")
    assert dest.joinpath("d/other").read_bytes() == b"stays"
    assert stat.S_IMODE(dest.joinpath("d").stat().st_mode) == 0o750
    assert stat.S_IMODE(dest.joinpath("n").stat().st_mode) == 0o500
    assert dest.joinpath("n").stat().st_mtime == 7
    assert sorted(str(path.relative_to(dest)) for path in dest.rglob("*")) == [
        "d",
        "d/file",
        "d/other",
        "n",
        "n/f",
        "n/h",
        "n/l",
    ]


@pytest.mark.parametrize("cut", [700, 2000, 400_000, 1_000_511])
def test_put_that_is_cut_leaves_nothing_half(tool: Tool, dest: Path, cut: int) -> None:
    dest.joinpath("f").write_bytes(b"old")
    data = tool.archive((tool.member("f"), b"n" * 1_000_000), form=tarfile.GNU_FORMAT)
    done = tool.files("put", dest, data[:cut])
    assert done.returncode == 1
    assert b"f: archive is cut short" in done.stderr
    assert {path.name: path.read_bytes() for path in dest.iterdir()} == {"f": b"old"}


def test_put_never_follows_symlinks(tool: Tool, dest: Path, tmp_path: Path) -> None:
    make = tool.member
    dest.joinpath("there").symlink_to(tmp_path)
    for members in (
        [make("s", tarfile.SYMTYPE, ".."), (make("s/outside"), b"x")],
        [make("s", tarfile.SYMTYPE, str(tmp_path)), (make("s/outside"), b"x")],
        [(make("there/outside"), b"x")],
        [make("inner", tarfile.DIRTYPE), make("s", tarfile.SYMTYPE, "inner"), (make("s/f"), b"x")],
        [make("there/new", tarfile.DIRTYPE)],
        [make("h", tarfile.LNKTYPE, "there/outside")],
        [make("there", tarfile.DIRTYPE)],
        [(make("../outside"), b"x")],
    ):
        done = tool.files("put", dest, tool.archive(*members))
        assert done.returncode == 1
        assert done.stderr.count(b"\n") == 1
    assert tool.files("put", dest, tool.archive((make("there"), b"x"))).returncode == 0
    assert dest.joinpath("there").read_bytes() == b"x"
    assert not dest.joinpath("there").is_symlink()


def test_put_destination_may_be_a_symlink(tool: Tool, dest: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("other").symlink_to("dest")
    assert tool.files("put", tmp_path / "other", tool.archive((tool.member("f"), b"x"))).returncode == 0
    assert dest.joinpath("f").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("make_it", "cause"),
    [
        (lambda tool: (tool.member("absent/f"), b""), b"absent/f: cannot open the parent directory: No such file"),
        (lambda tool: (tool.member("dir"), b""), b"dir: cannot put in place: Is a directory"),
        (lambda tool: tool.member("file", tarfile.DIRTYPE), b"there is something else in the place"),
        (lambda tool: tool.member("null", tarfile.CHRTYPE, devmajor=1, devminor=3), b"null: device nodes"),
    ],
)
def test_put_refuses(
    tool: Tool, dest: Path, make_it: Callable[[Tool], tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]], cause: bytes
) -> None:
    dest.joinpath("dir/inner").mkdir(parents=True)
    dest.joinpath("file").touch()
    done = tool.files("put", dest, tool.archive(make_it(tool)))
    assert done.returncode == 1
    assert cause in done.stderr
    assert sorted(path.name for path in dest.iterdir()) == ["dir", "file"]


def test_put_makes_holes(tool: Tool, dest: Path) -> None:
    content = b"a" * 5000 + bytes(5_000_000) + b"b" * 5000 + bytes(3_000_000)
    assert tool.files("put", dest, tool.archive((tool.member("f"), content))).returncode == 0
    assert dest.joinpath("f").read_bytes() == content
    assert dest.joinpath("f").stat().st_blocks * 512 <= 40_000


def test_put_to_a_file(tool: Tool, dest: Path) -> None:
    dest.joinpath("f").touch()
    done = tool.files("put", dest / "f", tool.archive(tool.member("x")))
    assert done.returncode == 1
    assert done.stderr.endswith(b"/f: Not a directory\n")


def test_put_beyond_a_limit_is_an_error(tool: Tool, dest: Path) -> None:
    data = tool.archive((tool.member("f"), b"x" * 100_000))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = tool.files("put", dest, data, preexec_fn=limit)
    assert done.returncode == 1
    assert b"f: cannot write: File too large" in done.stderr
    assert list(dest.iterdir()) == []


@pytest.mark.root
def test_put_on_a_full_disk(tool: Tool, dest: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", dest], check=True)
    try:
        done = tool.files("put", dest, tool.archive((tool.member("f"), b"x" * 3_000_000)))
        assert done.returncode == 1
        assert done.stderr == b"f: cannot write: No space left on device\n"
        assert list(dest.iterdir()) == []
    finally:
        subprocess.run(["umount", dest], check=True)


@pytest.mark.root
def test_put_owners(tool: Tool, dest: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = tool.archive((tool.member("f", uid=12, gid=34, mode=0o4755), b""))
    assert tool.files("put", dest, data).returncode == 0
    info = dest.joinpath("f").stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (12, 34, 0o4755)
    place = _reachable(tmp_path_factory.mktemp("put"))
    os.chown(place, 65534, 65534)
    assert tool.files("put", place, data, user=65534, group=65534, extra_groups=[]).returncode == 0
    assert place.joinpath("f").stat().st_uid == 65534


def test_put_while_the_place_is_exchanged(tool: Tool, dest: Path, tmp_path: Path) -> None:
    """A directory that turns into a symlink to the outside and back, all the time, never lets a member out."""
    make = tool.member
    data = tool.archive(*((make("d/outside"), b"x") for _ in range(300)))
    dest.joinpath("d").mkdir()
    dest.joinpath("s").symlink_to(tmp_path)
    stop = threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            for old, new in (("d", "t"), ("s", "d"), ("d", "s"), ("t", "d")):
                dest.joinpath(old).rename(dest / new)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(20):
            tool.files("put", dest, data)
    finally:
        stop.set()
        thread.join()


# -- STAT and LIST


def test_stat(tool: Tool, source: Path) -> None:
    info = source.joinpath("dir/file").stat()
    [(fields, name, target)] = _records(tool.files("stat", source / "dir/file").stdout)
    assert fields == ["f", "640", str(info.st_uid), str(info.st_gid), "300000", str(info.st_mtime_ns)]
    assert (name, target) == (b"file", b"")
    [(fields, name, target)] = _records(tool.files("stat", source / "to-dir").stdout)
    assert (fields[0], name, target) == ("l", b"to-dir", b"dir")


def test_list(tool: Tool, source: Path) -> None:
    source.joinpath("dir/odd \n\xff name").touch()
    os.utime(source / "dir/odd \n\xff name", ns=(0, -5))
    found = {name: (fields, target) for fields, name, target in _records(tool.files("list", source / "to-dir").stdout)}
    assert list(found) == sorted(os.fsencode(path.name) for path in source.joinpath("dir").iterdir())
    assert {name: fields[0] for name, (fields, _) in found.items()}[b"fifo"] == "p"
    assert found[b"link"][1] == b"file"
    assert found["odd \n\xff name".encode()][0][5] == "-5"


def test_list_of_a_file_and_of_nothing(tool: Tool, source: Path, tmp_path: Path) -> None:
    assert tool.files("list", source / "dir/file").returncode == 1
    tmp_path.joinpath("empty").mkdir()
    done = tool.files("list", tmp_path / "empty")
    assert (done.returncode, done.stdout) == (0, b"")
