"""The monitor of an emulator that was taken over: it says what no emulator says, and costs its box alone."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import pytest

from hutch.engine import record
from hutch.engine.vm import qmp
from hutch.errors import EngineError, UpstreamUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

GREETING = b'{"QMP": {}}\n{"return": {}}\n'


@contextlib.contextmanager
def emulator(directory: Path, said: bytes, seconds: float) -> Iterator[None]:
    """Something that listens where an emulator does: to whoever comes it says this, again and again."""
    (directory / "run").mkdir()

    def speak() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(GREETING)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                connection.sendall(said)

    with record.listen(directory, qmp.SOCKET) as listener:
        listener.setblocking(True)
        speaker = threading.Thread(target=speak)
        speaker.start()
        try:
            yield
        finally:
            speaker.join(seconds + 10)
            assert not speaker.is_alive()


async def test_events_without_end_are_not_waited_out(tmp_path: Path) -> None:
    """Nobody else in the process waits meanwhile, and the limit holds."""
    with (
        emulator(tmp_path, b'{"event": "?"}\n' * 4096, 4),
        pytest.raises(UpstreamUnavailableError, match="does not answer"),
    ):
        async with qmp.monitor(tmp_path, seconds=0.5) as monitor:
            await monitor.command("query-status")


@pytest.mark.parametrize(
    "said",
    [
        b'{"return": ' + b"[" * 100_000 + b"\n",
        b'{"return": "\xff"}\n',
        b'{"return": 1, "return"}\n',
        b'["return"]\n',
        b" " * (1 << 20),
    ],
    ids=["deep", "no text", "no value", "no object", "no end"],
)
async def test_rubbish_is_told_as_such(tmp_path: Path, said: bytes) -> None:
    with emulator(tmp_path, said, 0.1), pytest.raises(EngineError, match="emulator"):
        async with qmp.monitor(tmp_path, seconds=10) as monitor:
            await monitor.command("query-status")
