"""The records of STAT and LIST (docs/agent-protocol.md, "Files"). They come out of the box, so nothing in them is
trusted."""

from __future__ import annotations

from hutch.errors import UpstreamUnavailableError
from hutch.types import FileInfo

TYPES = {
    "f": "file",
    "d": "directory",
    "l": "symlink",
    "p": "fifo",
    "s": "socket",
    "c": "char",
    "b": "block",
}


def parse_listing(data: bytes) -> list[FileInfo]:
    """Turn the output of STAT or LIST into file descriptions. Raises `UpstreamUnavailableError` for what is not
    one."""
    fields = data.split(b"\0")
    if fields.pop() != b"" or len(fields) % 2:
        raise UpstreamUnavailableError("the box's agent sent a malformed list of files")
    found = []
    try:
        for head, target in zip(fields[::2], fields[1::2], strict=True):
            kind, mode, uid, gid, size, mtime, name = head.split(b" ", 6)
            found.append(
                FileInfo(
                    name=name.decode("utf-8", "surrogateescape"),
                    type=TYPES[kind.decode()],
                    mode=int(mode, 8),
                    uid=int(uid),
                    gid=int(gid),
                    size=int(size),
                    mtime=int(mtime) / 1e9,
                    target=target.decode("utf-8", "surrogateescape") if kind == b"l" else None,
                )
            )
    except (ValueError, KeyError, OverflowError) as error:
        raise UpstreamUnavailableError("the box's agent sent a malformed list of files") from error
    return found
