"""What is printed: tables, JSON, relative times. Text that a box or an image chose is made harmless."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SHORT_ID = 12
_STEPS = (
    ("year", 31_557_600),
    ("month", 2_629_800),
    ("week", 604_800),
    ("day", 86_400),
    ("hour", 3600),
    ("minute", 60),
    ("second", 1),
)


def clean(text: str) -> str:
    """Make text safe for a terminal: what is not printable becomes its escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def line(text: str) -> None:
    """Print one line on standard output."""
    sys.stdout.write(clean(text) + "\n")


def note(text: str) -> None:
    """Print one line on standard error."""
    sys.stdout.flush()
    sys.stderr.write(clean(text) + "\n")
    sys.stderr.flush()


def error(failure: BaseException) -> None:
    """Print ``Error: …`` on standard error."""
    note(f"Error: {failure}" if str(failure) else f"Error: {type(failure).__name__}")


def json_value(value: Any) -> None:
    """Print a value (structs included) as JSON, in ASCII, so that it is safe everywhere."""
    sys.stdout.write(json.dumps(msgspec.to_builtins(value), indent=2) + "\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns; the header is there even without a row."""
    grid = [list(header), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in grid) for column in range(len(header))]
    for row in grid:
        sys.stdout.write("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


def ago(then: float, now: float) -> str:
    """``3 minutes ago``. Unix seconds."""
    seconds = now - then
    for unit, length in _STEPS:
        if seconds >= length:
            number = int(seconds // length)
            return f"{number} {unit}{'s' if number > 1 else ''} ago"
    return "just now"


def size(number: int | None) -> str:
    """Bytes for people: ``1.5 GiB``; ``-`` for unknown."""
    if number is None:
        return "-"
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def shorten(text: str, width: int) -> str:
    """Cut text to ``width`` characters, with an ellipsis."""
    return text if len(text) <= width else text[: width - 1] + "…"


def short_digest(digest: str) -> str:
    """The first 12 digits of ``sha256:…``."""
    return digest.rpartition(":")[2][:SHORT_ID]
