"""The machine's own apt configuration: where it gets its packages from.

Sources: sources.list(5), both the one-line style and deb822.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hutch.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_APT: Final = Path("/etc/apt")
_ONE_LINE: Final = re.compile(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]+)")
_POCKETS: Final = ("", "-updates", "-security")
_COMPONENT: Final = "main"


def sources(suite: str, folder: Path = _APT) -> list[str]:
    """Return the machine's apt sources of a suite and its updates, as lines of the one-line style.

    Only what has the component ``main`` counts: the sources of single products are left out. Raises `ImageError` when
    there is none.
    """
    wanted = {suite + pocket for pocket in _POCKETS}
    lines = [
        f"deb {f'[{options}] ' if options else ''}{uri} {name} {_COMPONENT}"
        for options, uri, name, components in _entries(folder)
        if name in wanted and _COMPONENT in components
    ]
    if not any(line.split()[-2] == suite for line in lines):
        raise ImageError(f"no apt source under {folder} has the suite {suite!r}; add one, or name another suite")
    return list(dict.fromkeys(lines))


def _entries(folder: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield options, URI, suite and components of all sources."""
    parts = folder / "sources.list.d"
    for path in [folder / "sources.list", *sorted(parts.glob("*.list"))]:
        if path.is_file():
            for line in path.read_text("utf-8", "replace").splitlines():
                if match := _ONE_LINE.match(line.strip()):
                    yield match[1] or "", match[2], match[3], match[4].split()
    for path in sorted(parts.glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text("utf-8", "replace")):
            yield from _stanza(stanza)


def _stanza(text: str) -> Iterator[tuple[str, str, str, list[str]]]:
    fields: dict[str, str] = {}
    last = ""
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace():
            fields[last] = fields.get(last, "") + "\n" + line.strip()
        else:
            last, _, value = line.partition(":")
            last = last.lower()
            fields[last] = value.strip()
    if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
        return
    key = fields.get("signed-by", "")
    # A key that stands in the file itself cannot be said in one line; apt's own keyring has those of the distribution.
    options = f"signed-by={key}" if key.startswith("/") and "\n" not in key else ""
    for uri in fields.get("uris", "").split():
        for suite in fields.get("suites", "").split():
            yield options, uri, suite, fields.get("components", "").split()
