"""Keeps a background process alive: ``python -m hutch.host.keeper MODULE ARGUMENT…`` leaves the session, runs the
module, and runs it again when it does not end with 0, as after a kill. Whoever starts it does not have to stay."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from hutch.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0
_STEADY_SECONDS = 30.0
_START_SECONDS = 30.0
# A process that fails so often in a row without having run steadily will not do better.
_MOST_FAILURES = 20


def start(log: Path, module: str, *arguments: str) -> None:
    """Start a module in the background, and its keeper. What it writes goes to the file ``log``.

    Raises `EngineError` when that fails.
    """
    try:
        with log.open("ab") as output:
            subprocess.run(
                [sys.executable, "-P", "-m", "hutch.host.keeper", module, *arguments],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=_START_SECONDS,
                check=True,
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(f"cannot start {module} in the background (see {log}): {error}") from error


def main(command: Sequence[str]) -> int:
    """Keep the module running; returns when it has ended well, or is given up."""
    if os.fork():
        os._exit(0)  # the caller has a good end to wait for, and init gets the rest
    os.setsid()
    failures, pause = 0, _FIRST_PAUSE
    while failures < _MOST_FAILURES:
        began = time.monotonic()
        if subprocess.run([sys.executable, "-P", "-m", *command], check=False).returncode == 0:
            return 0
        if time.monotonic() - began > _STEADY_SECONDS:
            failures, pause = 0, _FIRST_PAUSE
        failures += 1
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
