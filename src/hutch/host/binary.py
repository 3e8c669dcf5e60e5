"""Where the native agent program is."""

from __future__ import annotations

import os
from pathlib import Path

from hutch.errors import EngineError


def agent_path() -> Path:
    """Return the path of ``box-agent``, the one native program (``HUTCH_AGENT`` overrides).

    Raises `EngineError` when the installation lacks it.
    """
    override = os.environ.get("HUTCH_AGENT")
    path = Path(override) if override else Path(__file__).parent.parent / "_bin" / "box-agent"
    if not os.access(path, os.X_OK):
        raise EngineError(
            f"the agent program {path} is missing or not executable; install the wheel, or run `make -C agent`"
        )
    return path
