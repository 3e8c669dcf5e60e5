"""The programming interface: one set of protocols (`hutch.sdk.base`), and where implementations come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime import LocalRuntime
    from hutch.sdk.remote import RemoteRuntime


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

    @staticmethod
    def connect(url: str, api_key: str | None = None, *, path_prefix: str = "", budget: float = 60.0) -> RemoteRuntime:
        """Return the runtime of a server. Use it with ``async with``.

        ``path_prefix``: what the server's paths have after ``/v1/``. ``budget``: seconds within which a lost
        connection to an execution must be made again. Raises
        `InvalidArgumentError` for what is not the address of a server.
        """
        from hutch.sdk.remote import RemoteRuntime

        return RemoteRuntime(url, api_key, path_prefix=path_prefix, budget=budget)


__all__ = ["Runtime"]
