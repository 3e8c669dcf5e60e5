"""What every command gets: where the boxes are, the signals of this process, and a way to open the runtime."""

from __future__ import annotations

import signal
import sys
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from hutch.cli.credentials import choose
from hutch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from hutch.cli.credentials import Target
    from hutch.runtime import LocalRuntime
    from hutch.sdk.base import Runtime
    from hutch.sdk.remote import RemoteRuntime

    Handler = Callable[[int], object]

STOPPED_BY = 128


class Session:
    """One run of the tool.

    SIGINT, SIGTERM and SIGHUP go to the innermost handler; without one they cancel the command, whose
    tear-down runs before the process ends with 128+N. A second one does not wait for the tear-down.
    """

    def __init__(
        self, home: str | None, *, url: str | None = None, profile: str | None = None, local: bool = False
    ) -> None:
        """The arguments are the options of these names."""
        self.home = home
        self.url = url
        self.profile = profile
        self.local = local
        self.signal: int | None = None
        self._scope = anyio.CancelScope()
        self._handlers: list[Handler] = [self._leave]

    @property
    def folder(self) -> Path:
        """The home directory. Raises `ConfigError` for a relative one."""
        from hutch.runtime.home import default_home

        folder = Path(self.home) if self.home else default_home()
        if not folder.is_absolute():
            raise ConfigError(f"the home directory {str(folder)!r} must be an absolute path")
        return folder

    def target(self) -> Target | None:
        """The server whose boxes the command is about; ``None``: those of this machine."""
        return choose(self.folder, url=self.url, profile=self.profile, local=self.local)

    @asynccontextmanager
    async def runtime(self) -> AsyncIterator[Runtime]:
        """Open the runtime: the server's, or the one on the home."""
        from hutch import Runtime

        opened: LocalRuntime | RemoteRuntime
        if (target := self.target()) is None:
            opened = Runtime.local(self.home)
        else:
            server = target.profile
            opened = Runtime.connect(server.url, server.api_key, path_prefix=server.path_prefix)
        async with opened as runtime:
            yield runtime

    @contextmanager
    def on_signal(self, handler: Handler) -> Iterator[None]:
        """Hand the signals to ``handler`` for the time of the block."""
        self._handlers.append(handler)
        try:
            yield
        finally:
            self._handlers.remove(handler)

    def leave(self, signum: int) -> None:
        """Cancel the command; the exit code will be 128 + ``signum``."""
        self.signal = signum
        self._scope.cancel()

    async def run(self, call: Callable[[], Awaitable[int]]) -> int:
        """Run a command under the signal rules and return the exit code."""
        code = 0
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._route)
            try:
                with self._scope:
                    code = await call()
            except Exception as error:  # carried out of the task group, which would wrap it
                failure = error
            tasks.cancel_scope.cancel()
        if self.signal is not None:
            return STOPPED_BY + self.signal
        if failure is not None:
            raise failure
        return code

    async def _route(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as received:
            task_status.started()
            async for signum in received:
                self._handlers[-1](signum)

    def _leave(self, signum: int) -> None:
        if self.signal is not None:
            sys.stderr.flush()
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.leave(signum)
