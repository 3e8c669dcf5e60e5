"""Credit for stdin: how many bytes may be on their way to a command that has not read them yet."""

from __future__ import annotations


class Credit:
    """A counter that the receiver fills and the sender draws from."""

    def __init__(self, size: int = 0) -> None:
        self._size = size
        self._closed = False

    def grant(self, size: int) -> None:
        """The receiver has room for ``size`` bytes more."""
        self._size += size

    def close(self) -> None:
        """The receiver is gone: from now on everything is taken and thrown away by the sender."""
        self._closed = True

    def draw(self, wanted: int) -> int:
        """Take up to ``wanted`` bytes of credit; returns how many may be sent now."""
        taken = min(wanted, self._size)
        self._size -= taken
        return taken

    @property
    def closed(self) -> bool:
        """Whether the receiver is gone."""
        return self._closed

    @property
    def size(self) -> int:
        """Credit that is left."""
        return self._size
