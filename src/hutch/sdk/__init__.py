"""The programming interface: one set of protocols (`hutch.sdk.base`), and where implementations come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime import LocalRuntime


class Runtime:
    """Where runtimes come from."""

    @staticmethod
    def local(home: Path | str | None = None) -> LocalRuntime:
        """Return the embedded runtime on a home directory (default: ``$HUTCH_HOME`` or ``~/.hutch``). Use it with
        ``async with``.

        Raises `ConfigError`, `StorageError` or `EngineError` when it is entered on a machine that cannot serve it.
        """
        from hutch.runtime import LocalRuntime

        return LocalRuntime(home)


__all__ = ["Runtime"]
