"""What output can be delivered to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Writer(Protocol):
    """An object with a ``write`` method that takes all the bytes it is given (``None`` or any return value), sync or
    async.

    A sync ``write`` may block: it runs in a thread, and holds back only its own stream.
    """

    def write(self, data: bytes, /) -> object: ...


Sink = Writer | Callable[[bytes], object]
"""A writer, or a callable (sync or async) that takes bytes. A sync callable runs in the event loop, so it must not
block."""
