"""Where a value that must be nowhere has been left, in whichever form."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import re
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus

from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_HUFFMAN = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)
_ZSTD, _GZIP = b"\x28\xb5\x2f\xfd", b"\x1f\x8b"
_TAR_AT, _TAR = 257, b"ustar"


def forms(value: str) -> set[bytes]:
    """How the value may be written: as it is, escaped for JSON and URLs, in hex, in base64 wherever it stands in what
    was encoded, and as Python shows it, also when it is compressed as a header."""
    raw = value.encode()
    texts = {raw, json.dumps(value)[1:-1].encode(), repr(value)[1:-1].encode(), raw.hex().encode()}
    texts |= {raw.hex().upper().encode()}
    # As HTTP/2 writes it, where Python shows that.
    texts.add(repr(_HUFFMAN.encode(raw)[:-1])[2:-1].encode())
    for text in (quote(value, safe=""), quote(value), quote_plus(value)):
        texts |= {text.encode(), re.sub("%..", lambda found: found[0].lower(), text).encode()}
    for before in range(3):
        # The first and the last characters depend on what is beside it.
        middle = base64.b64encode(bytes(before) + raw)[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        texts |= {middle, middle.translate(bytes.maketrans(b"+/", b"-_"))}
    return texts


def searched(root: Path) -> list[Path]:
    """The files below a folder, but for images."""
    return [path for path in root.rglob("*") if path.is_file() and "images" not in path.relative_to(root).parts]


def contents(data: bytes) -> Iterator[bytes]:
    """The bytes, and what is in them where they are an archive or compressed."""
    yield data
    if data.startswith(_ZSTD):
        yield from contents(zstd.decompress(data))
    elif data.startswith(_GZIP):
        yield from contents(gzip.decompress(data))
    elif data[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is not None:
                    yield from contents(file.read())


def shows(value: str, texts: Iterable[bytes]) -> bool:
    """Whether one of the texts has the value."""
    wanted = forms(value)
    return any(form in piece for text in texts for piece in contents(text) for form in wanted)


def processes() -> list[int]:
    """All of this machine into which one can look."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "environ").read_bytes() is not None:
                found.append(int(entry.name))
    return found


def holders(value: str, *roots: Path, processes: Iterable[int] = ()) -> list[Path]:
    """The files below the folders, and of what the kernel tells of processes, that hold the value. What is removed
    meanwhile holds nothing."""
    paths = [path for root in roots for path in (searched(root) if root.is_dir() else [root])]
    paths += [Path(f"/proc/{pid}/{name}") for pid in processes for name in ("environ", "cmdline")]
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if shows(value, [path.read_bytes()]):
                found.append(path)
    return found
