"""The runtime behind a server: `hutch.sdk.base.Runtime` over REST and the relay (docs/remote.md)."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio

from hutch.core import ids
from hutch.errors import EngineError, HutchError, RuntimeClosedError, UpstreamUnavailableError
from hutch.runtime.checks import check_callable, check_name, check_path, check_seconds
from hutch.runtime.home import new_id
from hutch.runtime.spec import build_spec, check_spec
from hutch.sdk.remote_box import RemoteBox
from hutch.sdk.remote_http import Http
from hutch.sdk.remote_library import RemoteImages, RemoteVolumes, pieces
from hutch.sdk.remote_wire import CreateBody, Identity, dumps
from hutch.types import BoxInfo, BoxSpec, Isolation

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Literal, Self

    from anyio.abc import TaskGroup, TaskStatus

    from hutch.types import Mount, NetPolicy, Outbound, Progress, PublishedPort, Secret

log = logging.getLogger("hutch.remote")

_CLOSE_SECONDS = 5.0
# When to look for a box whose creation gave no answer.
_UNMAKE_PAUSES = (0.0, 0.2, 1.0, 5.0, 30.0)


class RemoteRuntime:
    """The boxes of a server. Use it as an async context manager. Implements `hutch.sdk.base.Runtime`.

    ``path_prefix``: what the server's paths have after ``/v1/``. ``budget``: seconds within which a lost connection
    to an execution must be made again. ``patience``: seconds for which a request that may be repeated is repeated
    while the server does not answer.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        path_prefix: str = "",
        budget: float = 60.0,
        patience: float = 8.0,
    ) -> None:
        check_seconds("budget", budget, endless=False)
        check_seconds("patience", patience, endless=False)
        self.http = Http(url, api_key, path_prefix=path_prefix, patience=patience)
        self.budget = budget
        self.images = RemoteImages(self.http)
        self.volumes = RemoteVolumes(self.http)
        self._tasks: TaskGroup | None = None
        self._boxes: dict[str, RemoteBox] = {}
        # Boxes that end with this runtime: by id, whether they are to be removed then.
        self._own: dict[str, bool] = {}
        self._closed = False

    async def __aenter__(self) -> Self:
        # As in the embedded runtime: a group of a task of its own, which `close` can cancel.
        self._root = anyio.create_task_group()
        await self._root.__aenter__()
        try:
            self._tasks = await self._root.start(_hold_tasks)
        except BaseException:
            await self.close()
            await self._root.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
        await self._root.__aexit__(None, None, None)

    async def close(self) -> None:
        """Stop the boxes that this runtime made and that are not detached, end all waits, release everything.
        Idempotent."""
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            for box in list(self._boxes.values()):
                box.runtime_closed()
            async with anyio.create_task_group() as tasks:
                for box_id, remove in self._own.items():
                    tasks.start_soon(self._end, box_id, remove)
            if self._tasks is not None:
                self._tasks.cancel_scope.cancel()
            await self.http.close()

    # Boxes.

    async def create(
        self,
        image: str | BoxSpec,
        *,
        name: str | None = None,
        command: Sequence[str] | None = None,
        entrypoint: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        labels: Mapping[str, str] | None = None,
        cpus: int | None = None,
        memory_mib: int | None = None,
        disk_gb: int | None = None,
        pids: int | None = 4096,
        mounts: Sequence[Mount] = (),
        network: NetPolicy | Outbound | str | Sequence[str] = "disabled",
        ports: Sequence[PublishedPort | int] = (),
        secrets: Sequence[Secret] = (),
        isolation: Isolation | str = "auto",
        auto_remove: bool = False,
        auto_resume: bool = False,
        detach: bool = False,
        hostname: str | None = None,
        tty: bool = False,
        open_stdin: bool = False,
        stop_signal: str | None = None,
        platform: str | None = None,
        pull: Literal["missing", "always", "never"] = "missing",
        progress: Callable[[Progress], None] | None = None,
        box_id: str | None = None,
    ) -> RemoteBox:
        """Make a box. See `hutch.sdk.base.Runtime.create`. Folders of the host cannot be mounted from afar."""
        self._check_open()
        if isinstance(image, BoxSpec):
            spec = image
        else:
            spec = build_spec(
                image=image,
                name=name,
                command=command,
                entrypoint=entrypoint,
                env=env,
                workdir=workdir,
                user=user,
                labels=labels,
                cpus=cpus,
                memory_mib=memory_mib,
                disk_gb=disk_gb,
                pids=pids,
                mounts=mounts,
                network=network,
                ports=ports,
                secrets=secrets,
                isolation=isolation,
                auto_remove=auto_remove,
                auto_resume=auto_resume,
                detach=detach,
                hostname=hostname,
                tty=tty,
                open_stdin=open_stdin,
                stop_signal=stop_signal,
                platform=platform,
            )
        check_spec(spec)
        check_callable("progress", progress)
        made = new_id() if box_id is None else ids.check_id(box_id)
        body = CreateBody(id=made, spec=spec, pull=pull)
        try:
            info: BoxInfo = await self.http.repeat(
                lambda: self.http.call("POST", "/v1/x/boxes", BoxInfo, body, progress=progress)
            )
        except (EngineError, UpstreamUnavailableError, anyio.get_cancelled_exc_class()):
            if box_id is None:  # it may have been made all the same, and nobody would know of it
                self.spawn(self._unmake, made)
            raise
        if not spec.detach:
            self._own[info.id] = spec.auto_remove
        return self.handle(info)

    async def get(self, box: str) -> RemoteBox:
        """Find a box by name, id or unambiguous prefix of the id. Raises `NotFoundError`."""
        self._check_open()
        return self.handle(await self.http.get(_path(box), BoxInfo))

    async def list(self, *, labels: Mapping[str, str] | None = None) -> builtins.list[BoxInfo]:
        """List all boxes, or those that have the labels, oldest first."""
        self._check_open()
        wanted = None if labels is None else dumps(labels).decode()
        return await self.http.get("/v1/x/boxes", list[BoxInfo], labels=wanted)

    async def remove(self, box: str, *, force: bool = False) -> None:
        """Remove a box and all that it held. A running box needs ``force``."""
        self._check_open()
        await (await self.get(box)).remove(force=force)

    async def import_box(self, path: str | Path, *, name: str | None = None) -> RemoteBox:
        """Make a box from an archive that `Box.export` wrote."""
        self._check_open()
        if name is not None:
            ids.check_name(name)
        content = pieces(check_path("the archive", path))
        info = await self.http.call("POST", "/v1/x/boxes/import", BoxInfo, query={"name": name}, content=content)
        self._own[info.id] = False
        return self.handle(info)

    async def info(self) -> dict[str, object]:
        """Facts about the server's runtime."""
        self._check_open()
        return await self.http.get("/v1/x/info", dict[str, object])

    async def whoami(self) -> Identity:
        """Whose key this is, and what it may do."""
        self._check_open()
        return await self.http.get("/v1/me", Identity)

    # What boxes use.

    def spawn(self, function: Callable[..., Any], *args: Any) -> None:
        """Run a coroutine function in the background, for as long as the runtime lives. A failure is logged."""
        if self._closed or self._tasks is None:
            return
        self._tasks.start_soon(self._guarded, function, *args)

    def disown(self, box_id: str) -> None:
        """The box is none of those that end with this runtime."""
        self._own.pop(box_id, None)

    def removed(self, box_id: str) -> None:
        """The box is gone."""
        self.disown(box_id)
        if (box := self._boxes.pop(box_id, None)) is not None:
            box.lines.close()

    def ends(self, box_id: str) -> bool | None:
        """Whether the box ends with this runtime: true, by removal; false, by a stop; ``None``: it goes on."""
        return self._own.get(box_id)

    def handle(self, info: BoxInfo) -> RemoteBox:
        """The one handle on a box."""
        box = self._boxes.get(info.id)
        if box is None:
            box = self._boxes[info.id] = RemoteBox(self, info)
        return box

    # Private methods.

    async def _unmake(self, box_id: str) -> None:
        """Remove what a creation whose answer never came may have made, or may be making still."""
        for pause in _UNMAKE_PAUSES:
            await anyio.sleep(pause)
            with contextlib.suppress(HutchError):
                await self.remove(box_id, force=True)
                return

    async def _end(self, box_id: str, remove: bool) -> None:
        with contextlib.suppress(HutchError), anyio.move_on_after(_CLOSE_SECONDS):
            box = self._boxes[box_id]
            if remove:
                await box.remove(force=True)
            else:
                await box.stop(timeout=1.0)

    async def _guarded(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            await function(*args)
        except Exception:
            log.exception("a background task of the runtime failed")

    def _check_open(self) -> None:
        if self._closed or self._tasks is None:
            raise RuntimeClosedError("the runtime is closed; use it inside `async with`")


def _path(box: str) -> str:
    name = check_name("the name of a box", box)
    return f"/v1/x/boxes/{quote(name, safe='')}" if name else "/v1/x/boxes/%20"


async def _hold_tasks(*, task_status: TaskStatus[TaskGroup]) -> None:
    async with anyio.create_task_group() as tasks:
        task_status.started(tasks)
        await anyio.sleep_forever()
