"""Archives made to do harm: each is refused with its cause named, and nothing outside the destination changes (the
``dest`` fixture looks)."""

from __future__ import annotations

import subprocess
import tarfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.tar.conftest import Tool

pytestmark = pytest.mark.root


def header(
    name: bytes = b"f",
    kind: bytes = b"0",
    *,
    size: bytes = b"00000000000",
    mode: bytes = b"0000644",
    uid: bytes = b"0000000",
    link: bytes = b"",
    checksum: bytes | None = None,
    at_345: bytes = b"",
) -> bytes:
    """One raw header block."""
    block = bytearray(512)
    fields = (
        (0, name),
        (100, mode),
        (108, uid),
        (116, b"0000000"),
        (124, size),
        (136, b"0" * 11),
        (156, kind),
        (157, link),
    )
    for offset, value in (*fields, (257, b"ustar\x0000"), (345, at_345)):
        block[offset : offset + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = checksum if checksum is not None else f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    """An extended header."""
    body = b""
    for key, value in records:
        rest = len(key) + len(value) + 3
        length = rest + len(str(rest))
        length = rest + len(str(length))
        body += b"%d %s=%s\n" % (length, key, value)
    return raw(body, kind)


def raw(body: bytes, kind: bytes = b"x") -> bytes:
    return header(b"ext", kind, size=b"%011o" % len(body)) + body + bytes(-len(body) % 512)


END = bytes(1024)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        (b"../outside", "'..'"),
        (b"a/../../outside", "'..'"),
        (b"/../outside", "'..'"),
        (b"..", "'..'"),
        (b"a/..", "'..'"),
        (b"", "no name"),
        (b"/", "no name"),
        (b"././", "no name"),
        (b"n" * 300, "longer than 255"),
        (b"d/" * 2100 + b"f", "longer than 4096"),
        (b"a\0b", "NUL"),
    ],
)
def test_names(tool: Tool, dest: Path, name: bytes, cause: str) -> None:
    for data in (
        pax((b"path", name)) + header(b"" if not name else b"x"),
        header(b"L", b"L", size=b"%011o" % len(name)) + name + bytes(-len(name) % 512) + header(b""),
    ):
        if name == b"/" or name == b"././":
            data = data.replace(header(b""), header(b"", b"6")).replace(header(b"x"), header(b"x", b"6"))
        assert cause in tool.refused(data + END, dest)
    assert not any(path.is_file() for path in dest.rglob("*"))


def test_component_too_long_for_the_kernel(tool: Tool, dest: Path) -> None:
    assert "too long" in tool.refused(pax((b"path", b"n" * 258)) + header() + END, dest)


@pytest.mark.parametrize("target", ["../outside", "/outside", "absent", "s", "out/outside", "", "dir"])
def test_hard_links(tool: Tool, dest: Path, target: str) -> None:
    make = tool.member
    data = tool.archive(
        make("dir", tarfile.DIRTYPE),
        make("out", tarfile.SYMTYPE, ".."),
        make("s", tarfile.SYMTYPE, "../outside"),
        make("h", tarfile.LNKTYPE, target),
        (make("h"), b"overwritten"),
    )
    if target == "s":  # a link to the symlink itself, which the later file replaces
        tool.unpack(data, dest)
        assert dest.joinpath("h").read_bytes() == b"overwritten"
    else:
        assert "h: " in tool.refused(data, dest)


@pytest.mark.parametrize("to", ["..", "../..", "/", "/..", "{outer}", "../../../../../..{outer}", "/proc/self/root"])
@pytest.mark.parametrize("flags", [[], ["--layer"], ["--single-id"]])
def test_symlinks_stay_inside(tool: Tool, dest: Path, tmp_path: Path, to: str, flags: list[str]) -> None:
    make, link = tool.member, to.format(outer=tmp_path)
    data = tool.archive(
        make("s", tarfile.SYMTYPE, link),
        make("t", tarfile.SYMTYPE, "s"),
        (make("s/outside", mode=0o777), b"overwritten"),
        make("t/outside", tarfile.SYMTYPE, "x"),
    )
    done = tool.run("unpack", "--dest", dest, *flags, stdin=data)
    if done.returncode:
        assert b"symlink that leads nowhere" in done.stderr
    else:
        assert dest.joinpath("outside").readlink().name == "x"


def test_final_symlink_is_replaced_not_followed(tool: Tool, dest: Path, tmp_path: Path) -> None:
    make = tool.member
    for name in ("f", "d", "p"):
        dest.joinpath(name).symlink_to(tmp_path / "outside")
    dest.joinpath("hard").hardlink_to(tmp_path / "outside")
    data = tool.archive(
        (make("f", mode=0o777), b"x"),
        make("d", tarfile.DIRTYPE, mode=0o777),
        make("p", tarfile.FIFOTYPE, mode=0o777),
        (make("hard", mode=0o777), b"x"),
    )
    tool.unpack(data, dest)
    assert tmp_path.joinpath("outside").stat().st_mode & 0o777 == 0o600
    assert tmp_path.joinpath("outside").stat().st_nlink == 1


def test_removal_does_not_follow(tool: Tool, dest: Path, tmp_path: Path) -> None:
    dest.joinpath("d/e").mkdir(parents=True)
    dest.joinpath("d/e/out").symlink_to(tmp_path)
    tool.unpack(tool.archive((tool.member("d"), b"file")), dest)
    assert dest.joinpath("d").read_bytes() == b"file"


def test_removal_of_deep_trees_ends(tool: Tool, dest: Path) -> None:
    make = tool.member
    half = "a/" * 500
    data = tool.archive(
        (make(half + "f"), b""),
        make("a/s", tarfile.SYMTYPE, half[2:-1]),
        (make("a/s/" + half + "f"), b""),
        (make("a"), b""),
    )
    try:
        assert "cannot create" in tool.refused(data, dest)
    finally:
        subprocess.run(["rm", "-rf", dest / "a"], check=True)  # pytest's own clean-up cannot go that deep


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (header(checksum=b"0000001\0"), "checksum"),
        (header(checksum=b"garbage!"), "checksum"),
        (header(size=b"-0000000001"), "malformed size"),
        (header(size=b"99999999999"), "malformed size"),
        (header(size=b"\xff" * 12), "size is out of range"),
        (header(size=b"\x80\0\0\0\x7f" + b"\xff" * 7), "content is larger|cut short"),
        (header(size=b"\x80\0\0\0\xff" + b"\xff" * 7), "malformed size"),
        (header(size=b"00000001000"), "cut short"),
        (header(mode=b"zzzzzzz"), "malformed mode"),
        (header(uid=b"\xff" * 8), "uid is out of range"),
        (header(uid=b"\x80\0\0\0\xff\xff\xff\xff"), "owner is out of range"),
        (header(b"d/", b"0", size=b"00000001000") + bytes(512), "directory with content"),
        (header(kind=b"M"), "type 0x4d"),
        (header(kind=b"D"), "type 0x44"),
        (header(kind=b"\xff"), "type 0xff"),
        (header(kind=b"2"), "no target"),
        (header(kind=b"3")[:329], "cut short"),
        (bytes(512) + header(), "lone block of zeros"),
        (b"x" * 511, "cut short"),
        (b"not a tar" * 100, "checksum"),
        (b"", "no data"),
        (pax((b"path", b"x")), "ends after an extended header"),
        (raw(b"path=x\n"), "malformed extended header"),
        (raw(b"9 path=x\n\n"), "malformed extended header"),
        (raw(b"999999 path=x\n"), "malformed extended header"),
        (raw(b"99999999999999999999999 path=x\n"), "malformed extended header"),
        (raw(b"3 =\n"), "malformed extended header"),
        (raw(b"0 \n"), "malformed extended header"),
        (header(kind=b"x", size=b"%011o" % (1 << 21)), "larger than 1048576"),
        (header(kind=b"L", size=b"%011o" % (1 << 21)), "larger than 1048576"),
        (pax((b"size", b"-1")) + header(), "malformed number"),
        (pax((b"size", b"99999999999999999999")) + header(), "malformed number"),
        (pax((b"size", b"9223372036854775799")) + header(), "larger than|cut short"),
        (pax((b"mtime", b"never")) + header(), "malformed time"),
        (pax((b"uid", b"4294967295")) + header(), "owner is out of range"),
        (pax((b"path", b"x"), kind=b"g") + header(), "global header"),
        (pax((b"size", b"512"), kind=b"g") + header(), "global header"),
        (pax((b"SCHILY.xattr.trusted.overlay.redirect", b"/etc")) + header(), "steers overlayfs"),
        (pax((b"SCHILY.xattr.user.overlay.opaque", b"y")) + header(kind=b"5"), "steers overlayfs"),
        (pax((b"SCHILY.xattr.user.overlay.overlay.opaque", b"y")) + header(kind=b"5"), "steers overlayfs"),
        (pax((b"SCHILY.xattr.user.big", b"v" * 70000)) + header(), "larger than 65536"),
        (pax((b"SCHILY.xattr.user." + b"n" * 300, b"v")) + header(), "bad name"),
        (pax(*((b"SCHILY.xattr.user.%d" % i, b"v") for i in range(200))) + header(), "more than 128"),
        (pax((b"GNU.sparse.major", b"1")) + header(), "real size"),
        (pax((b"GNU.sparse.major", b"2")) + header(), "unknown sparse"),
        (pax((b"GNU.sparse.map", b"0,1,2"), (b"GNU.sparse.size", b"9")) + header(), "GNU.sparse.map"),
        (pax((b"GNU.sparse.map", b"0,5"), (b"GNU.sparse.size", b"4")) + header(), "out of bounds"),
        (pax((b"GNU.sparse.map", b"5,1,0,1"), (b"GNU.sparse.size", b"9")) + header(), "out of order"),
        (pax((b"GNU.sparse.map", b"0,5"), (b"GNU.sparse.size", b"9")) + header(), "stored size"),
        (pax((b"GNU.sparse.numbytes", b"5"), (b"GNU.sparse.size", b"9")) + header(), "malformed sparse"),
        (
            pax((b"GNU.sparse.map", b"9223372036854775799,9223372036854775799"), (b"GNU.sparse.size", b"9")) + header(),
            "bounds",
        ),
        (
            pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9")) + header(size=b"%011o" % 512) + b"7" * 512,
            "sparse map",
        ),
        (
            pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9"))
            + header(size=b"%011o" % 512)
            + b"9999999\n" * 64,
            "too many",
        ),
    ],
)
def test_structure(tool: Tool, dest: Path, bad: bytes, cause: str) -> None:
    line = tool.refused(
        bad + (END if len(bad) % 512 == 0 and bad and "short" not in cause and "ends" not in cause else b""), dest
    )
    assert any(part in line for part in cause.split("|")), line


def test_old_sparse_map_out_of_bounds(tool: Tool, dest: Path) -> None:
    block = bytearray(header(kind=b"S", size=b"%011o" % 512))
    block[257:265] = b"ustar  \0"
    block[386:410] = b"%011o\0%011o\0" % (1 << 20, 512)
    block[483:494] = b"%011o" % 512
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    assert "out of bounds" in tool.refused(bytes(block) + bytes(512) + END, dest)


def test_member_is_escaped(tool: Tool, dest: Path) -> None:
    line = tool.refused(pax((b"path", b"\x1b[2J\n" + b"\xff" * 300 + b"/..")) + header() + END, dest)
    assert line.startswith("\\x1b[2J\\x0a\\xff")


# -- bombs


def test_too_many_bytes(tool: Tool, dest: Path) -> None:
    data = tool.archive((tool.member("a"), b"1" * 600), (tool.member("b"), b"1" * 600))
    assert "b: content is larger than 1000 bytes" in tool.refused(data, dest, "--max-bytes", "1000")
    assert tool.unpack(data, dest, "--max-bytes", "1200") == (2, 1200)


def test_holes_count_as_bytes(tool: Tool, dest: Path) -> None:
    records = ((b"GNU.sparse.map", b""), (b"GNU.sparse.size", b"%d" % (1 << 60)))
    data = pax((b"GNU.sparse.offset", b"0"), (b"GNU.sparse.numbytes", b"0"), *records[1:]) + header() + END
    assert "content is larger" in tool.refused(data, dest, "--max-bytes", str(1 << 30))
    assert not dest.joinpath("f").exists()


@pytest.mark.parametrize("name", ["f{}", "{}/f", "d/d/d/f{}"])
def test_too_many_entries(tool: Tool, dest: Path, name: str) -> None:
    data = tool.archive(*(tool.member(name.format(index)) for index in range(20)))
    assert "more than 10 entries" in tool.refused(data, dest, "--max-entries", "10")
    assert len(list(dest.rglob("*"))) <= 10


def test_parents_count_as_entries(tool: Tool, dest: Path) -> None:
    assert "more than 100 entries" in tool.refused(
        tool.archive(tool.member("d/" * 500 + "f")), dest, "--max-entries", "100"
    )


# -- layers


@pytest.mark.parametrize("name", [".wh.", "d/.wh.", ".wh..", ".wh...", "d/.wh.x/f", ".wh.x/y/.wh.z"])
def test_bad_whiteouts(tool: Tool, dest: Path, name: str) -> None:
    assert "whiteout" in tool.refused(tool.archive(tool.member(name)), dest, "--layer")


def test_plain_whiteout_device_is_refused(tool: Tool, dest: Path) -> None:
    data = tool.archive(tool.member("x", tarfile.CHRTYPE, devmajor=0, devminor=0))
    assert "would be a whiteout" in tool.refused(data, dest, "--layer")


@pytest.mark.parametrize("name", ["f", "f/g", "s/g"])
def test_parents_that_are_no_directories(tool: Tool, dest: Path, name: str) -> None:
    make = tool.member
    data = tool.archive((make("f"), b""), make("s", tarfile.SYMTYPE, "nowhere"), make(name + "/x"))
    assert "a parent is" in tool.refused(data, dest)


def test_rights_are_dropped(tool: Tool, dest: Path) -> None:
    """While it reads, the process is confined to the destination and can do no more than make files."""
    process = subprocess.Popen(
        [tool.program, "unpack", "--dest", dest],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert process.stdin is not None
    timer = threading.Timer(20, process.kill)
    timer.start()
    try:
        data = tool.archive((tool.member("first"), b""), (tool.member("big"), b"x" * 2_000_000))
        process.stdin.write(data[: len(data) // 2])
        process.stdin.flush()
        while not dest.joinpath("first").exists():
            assert process.poll() is None
        proc = f"/proc/{process.pid}"
        assert Path(proc, "root").readlink() == dest.resolve()
        lines = Path(proc, "status").read_text("ascii").splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        allowed = sum(1 << bit for bit in (0, 1, 3, 4, 27, 31))
        assert int(status["CapEff"], 16) & ~allowed == 0
        assert int(status["CapPrm"], 16) & ~allowed == 0
        assert status["NoNewPrivs"].strip() == "1"
        assert Path(proc, "ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink()
        process.stdin.write(data[len(data) // 2 :])
        process.stdin.close()
        assert process.wait(20) == 0
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def test_without_a_destination(tool: Tool, dest: Path) -> None:
    assert "cannot open the destination" in tool.refused(b"", dest / "absent")
    assert tool.run("unpack").returncode == 2
    assert tool.run("unpack", "--dest", dest, "--max-bytes", "-1").returncode == 2
