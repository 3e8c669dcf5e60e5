"""The tar code of box-agent on its own, built with the sanitizers, and the archives and trees to try it on."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

AGENT = Path(__file__).resolve().parents[2] / "agent"
SOURCES = ("tests/tar_main.c", "unpack.c", "pack.c", "files.c", "tunnel.c", "datagrams.c")
FLAGS = ("-std=c11", "-g", "-O1", "-D_GNU_SOURCE", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class Entry(NamedTuple):
    """What is compared of a file; ``first`` is the first of its names, so that hard links show."""

    kind: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    content: str
    device: int
    first: str
    xattrs: tuple[tuple[str, bytes], ...]


def tree(root: Path) -> dict[str, Entry]:
    """Describe everything below ``root``; the root itself is ``"."``."""
    found: dict[str, Entry] = {}
    first: dict[tuple[int, int], str] = {}
    paths = sorted(
        str(Path(where, name).relative_to(root))
        for where, folders, files in os.walk(root)
        for name in [*folders, *files]
    )
    for name in [".", *paths]:
        path = root / name
        info = path.lstat()
        content = ""
        if stat.S_ISREG(info.st_mode):
            content = f"{info.st_size} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        elif stat.S_ISLNK(info.st_mode):
            content = str(path.readlink())
        xattrs = tuple(
            sorted(
                (key, os.getxattr(path, key, follow_symlinks=False))
                for key in os.listxattr(path, follow_symlinks=False)
            )
        )
        origin = name if stat.S_ISDIR(info.st_mode) else first.setdefault((info.st_dev, info.st_ino), name)
        kind = stat.S_IFMT(info.st_mode)
        mode = stat.S_IMODE(info.st_mode)
        found[name] = Entry(
            kind, mode, info.st_uid, info.st_gid, info.st_mtime_ns, content, info.st_rdev, origin, xattrs
        )
    return found


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **fields: object) -> tarfile.TarInfo:
    """Make a header; ``fields`` are attributes of TarInfo."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.mtime = kind, link, 0o755 if kind == tarfile.DIRTYPE else 0o644, 1
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def archive(*members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Make an archive of headers, or pairs of header and content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for item in members:
            info, data = item if isinstance(item, tuple) else (item, b"")
            if info.isreg():
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


class Tool:
    """Runs the program; ``asan`` reports fail every test by their exit status 99."""

    def __init__(self, program: Path) -> None:
        self.program = program

    def run(self, *words: str | Path, stdin: bytes = b"", **options: object) -> subprocess.CompletedProcess[bytes]:
        environment = {"ASAN_OPTIONS": "detect_leaks=0:exitcode=99", "UBSAN_OPTIONS": "exitcode=99", "LC_ALL": "C"}
        done: subprocess.CompletedProcess[bytes] = subprocess.run(  # type: ignore[call-overload]
            [self.program, *words], input=stdin, capture_output=True, timeout=30, env=environment, **options
        )
        assert done.returncode in (0, 1, 2), done.stderr.decode(errors="replace")
        return done

    def unpack(self, data: bytes, dest: Path, *flags: str, **options: object) -> tuple[int, int]:
        """Unpack and return the entries and bytes that were reported."""
        done = self.run("unpack", "--dest", dest, *flags, stdin=data, **options)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert done.stderr == b""
        report = dict(word.split("=") for word in done.stdout.decode().split())
        return int(report["entries"]), int(report["bytes"])

    def refused(self, data: bytes, dest: Path, *flags: str) -> str:
        """Unpack what must fail, and return the one line that says why."""
        done = self.run("unpack", "--dest", dest, *flags, stdin=data)
        assert done.returncode == 1
        assert done.stdout == b""
        line = done.stderr.decode("ascii")
        assert line.count("\n") == 1
        assert len(line.split(":")[0]) <= 200
        return line

    def pack(self, source: Path, *flags: str) -> bytes:
        done = self.run("pack", "--source", source, *flags)
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done.stdout

    def files(
        self, op: str, path: str | Path, stdin: bytes = b"", **options: object
    ) -> subprocess.CompletedProcess[bytes]:
        return self.run("files", {"get": "1", "put": "2", "stat": "3", "list": "4"}[op], path, stdin=stdin, **options)

    member = staticmethod(member)
    archive = staticmethod(archive)
    tree = staticmethod(tree)


@pytest.fixture(scope="session")
def tool() -> Iterator[Tool]:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    with tempfile.TemporaryDirectory(prefix="hutch-tar-") as folder:
        Path(folder).chmod(0o755)  # other users run it too
        program = Path(folder, "tar_main")
        sources = [AGENT / name for name in SOURCES] + sorted(AGENT.glob("tar_*.c"))
        subprocess.run([compiler, *FLAGS, "-I", AGENT, *sources, "-o", program], check=True, timeout=50)
        yield Tool(program)


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    """The place to unpack to, and next to it a file that must never change."""
    tmp_path.joinpath("outside").write_bytes(b"untouched")
    tmp_path.joinpath("outside").chmod(0o600)
    path = tmp_path / "dest"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def nothing_outside(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    yield
    if "dest" in request.fixturenames:
        assert tmp_path.joinpath("outside").read_bytes() == b"untouched"
        assert {path.name for path in tmp_path.iterdir()} <= {"outside", "dest", "other", "source"}
