"""What went through the network of one box, and how fast it may."""

from __future__ import annotations

import time

# A limited reader takes what comes in this time, so that the limit holds for parts of a second, and many connections
# share it.
_SLICE_SECONDS = 0.05
_LEAST_BYTES, _MOST_BYTES = 2048, 1 << 20
_DATAGRAM_BYTES = 1 << 16
_MOST_PAUSE = 1.0


class Line:
    """One direction: counts bytes, and limits them by a token bucket. It may be overdrawn: whoever took too much
    pauses, and so does everybody who shares it."""

    def __init__(self) -> None:
        self.total = 0
        self._rate: int | None = None
        self._tokens = 0.0
        self._filled = time.monotonic()

    def limit(self, rate: int | None) -> None:
        """Change the limit, in bytes per second (``None``: none); what was overdrawn is forgiven."""
        if rate != self._rate:
            self._rate, self._tokens, self._filled = rate, 0.0, time.monotonic()

    @property
    def piece(self) -> int:
        """How many bytes to take at once, at most."""
        if self._rate is None:
            return _MOST_BYTES
        return min(_MOST_BYTES, max(_LEAST_BYTES, int(self._rate * _SLICE_SECONDS)))

    def count(self, size: int) -> float:
        """Count bytes; returns for how many seconds to pause before the next ones."""
        self.total += size
        if self._rate is None:
            return 0.0
        self._refill(self._rate)
        self._tokens -= size
        return self.pause()

    def pause(self) -> float:
        """Return for how many seconds to pause now: at most one even where more is owed, so that another limit holds
        soon."""
        if self._rate is None:
            return 0.0
        self._refill(self._rate)
        return min(_MOST_PAUSE, -self._tokens / self._rate) if self._tokens < 0 else 0.0

    def _refill(self, rate: int) -> None:
        now = time.monotonic()
        most = max(self.piece, _DATAGRAM_BYTES)
        self._tokens = min(most, self._tokens + (now - self._filled) * rate)
        self._filled = now


class Meter:
    """Both directions of one box, its connections (and UDP conversations), and how many of them were refused."""

    def __init__(self) -> None:
        self.outward = Line()
        self.inward = Line()
        self.connections = 0
        self.refused = 0
