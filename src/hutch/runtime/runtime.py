"""The embedded runtime: makes, finds and removes the boxes of one home. Any number of processes may use a home at
once."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from hutch.core import ids
from hutch.errors import (
    AlreadyExistsError,
    HutchError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    RuntimeClosedError,
)
from hutch.host.netns import nft
from hutch.host.proc import Process
from hutch.image import ImageStore, RegistryConfig
from hutch.runtime.bounds import bounded, reserve
from hutch.runtime.box import LocalBox
from hutch.runtime.channels import Channels
from hutch.runtime.checks import check_callable, check_name, quoted
from hutch.runtime.copies import Copies
from hutch.runtime.disks import Disks
from hutch.runtime.engines import Engines
from hutch.runtime.gatekeeper import Gatekeeper
from hutch.runtime.home import Home, new_id
from hutch.runtime.library import LocalImages, LocalVolumes
from hutch.runtime.lives import Lives
from hutch.runtime.records import ALIVE, Records, describe, title
from hutch.runtime.recovery import recover
from hutch.runtime.spec import build_spec, check_spec, resolve
from hutch.runtime.vault import Vault, environment, install, without_values
from hutch.state import BoxRecord, Store
from hutch.types import BoxSpec, BoxState, Isolation, NetPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Literal, Self

    from anyio.abc import TaskGroup, TaskStatus

    from hutch.engine.base import Engine
    from hutch.types import BoxInfo, ImageInfo, Mount, NetBounds, Outbound, Progress, PublishedPort, Secret

log = logging.getLogger("hutch.runtime")

_CLOSE_SECONDS = 5.0
_TRUST_SECONDS = 20.0


class LocalRuntime:
    """See the module. Use it as an async context manager. Implements `hutch.sdk.base.Runtime`."""

    def __init__(
        self,
        home: Path | str | None = None,
        *,
        engine: Engine | None = None,
        is_gateway: bool = False,
        bounds: NetBounds | None = None,
    ) -> None:
        """``is_gateway``: this is the process that serves the network of the home's boxes. ``bounds``: what those for
        whom this process works may have of the network."""
        self.bounds = bounds
        self._given_home = home
        self._given_engine = engine
        self.is_gateway = is_gateway
        self._tasks: TaskGroup | None = None
        self._boxes: dict[str, LocalBox] = {}
        self._closed = False
        self._process = Process.of(os.getpid())
        # Boxes that this runtime made.
        self._own: set[str] = set()

    async def __aenter__(self) -> Self:
        self.home = Home.open(self._given_home)
        self.store = Store(self.home.database)
        self.engines = Engines(self.home, self.store, self._given_engine)
        self.image_store = ImageStore(self.home.images, config=RegistryConfig(logins=self.home.logins))
        self.disks = Disks(self.home, self.store, self.engines)
        self.gatekeeper = Gatekeeper(self.home)
        self.channels = Channels(self.store, self.engines)
        self.records = Records(self.home, self.store, self.engines, self.channels)
        self.lives = Lives(
            self.home,
            self.store,
            self.engines,
            self.records,
            self.channels,
            self.image_store,
            self.disks,
            None if self.is_gateway else self.gatekeeper,
        )
        self.vault = Vault(self.home.root)
        self.lives.prepare = self._trust_gateway
        self.lives.bounds = self.bounds
        self.images = LocalImages(self)
        self.volumes = LocalVolumes(self)
        self.copies = Copies(self)
        # The caller's side of the background tasks; they live in a group of a task of their own, so that
        # `close` can cancel them without cancelling the body of the caller's `async with`.
        self._root = anyio.create_task_group()
        await self._root.__aenter__()
        try:
            self._tasks = await self._root.start(_hold_tasks)
            await recover(self)
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
            await self._stop_own()
            self.lives.close()
            self.store.close()
            if self._tasks is not None:
                self._tasks.cancel_scope.cancel()

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
    ) -> LocalBox:
        """Make a box. See `hutch.sdk.base.Runtime.create`."""
        self.check_open()
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
        spec = bounded(self.bounds, spec)
        check_callable("progress", progress)
        if box_id is not None and (made := self._made(ids.check_id(box_id), spec)) is not None:
            return made
        if spec.name is not None and self.store.has_box_named(spec.name):
            raise AlreadyExistsError(f"a box named {spec.name!r} exists already; remove it or choose another name")
        for mount in spec.mounts:
            if mount.volume and self.store.get_volume(mount.volume) is None:
                raise NotFoundError(f"volume {mount.volume!r} does not exist; create it first")
        info = await self.images.obtain(spec, pull, progress)
        record = self._record(spec, info, await self.engines.choose(spec), box_id or new_id())
        try:
            self.add(record)
        except AlreadyExistsError:  # by who asked for the same at the same time, perhaps
            if (made := self._made(record.id, spec)) is None:
                raise
            return made
        return self.handle(record)

    async def get(self, box: str) -> LocalBox:
        """Find a box by name, id or unambiguous prefix of the id. Raises `NotFoundError`."""
        self.check_open()
        return self.handle(self._find(box))

    async def list(self, *, labels: Mapping[str, str] | None = None) -> list[BoxInfo]:
        """List all boxes, or those that have the labels, oldest first."""
        self.check_open()
        if labels is not None and not isinstance(labels, Mapping):
            raise InvalidArgumentError(f"labels {quoted(labels)} is not a mapping of names to values")
        found = []
        for record in self.store.list_boxes():
            if labels and any(record.spec.labels.get(key) != value for key, value in labels.items()):
                continue
            with contextlib.suppress(NotFoundError):  # removed meanwhile
                found.append(describe(await self.records.verified(record)))
        return found

    async def remove(self, box: str, *, force: bool = False) -> None:
        """Remove a box and all that it held. A running box needs ``force``."""
        self.check_open()
        record = self._find(box)
        async with self.records.holding(record.id) as record:
            if record.state in ALIVE and not force:
                raise InvalidStateError(f"box {title(record)} runs; stop it first, or remove it by force")
            with anyio.CancelScope(shield=True):
                await self._erase(record)

    async def import_box(self, path: str | Path, *, name: str | None = None) -> LocalBox:
        """Make a box from an archive that `export` wrote. The archive is not trusted."""
        return await self.copies.import_box(path, name)

    async def info(self) -> dict[str, object]:
        """Facts about this runtime."""
        from hutch import __version__

        self.check_open()
        boxes = await self.list()
        return {
            "version": __version__,
            "home": str(self.home.root),
            "isolation": Isolation.VM if await self.engines.prefer_vm() else Isolation.CONTAINER,
            "vm": await self.engines.describe_vm(),
            "rootless": os.geteuid() != 0,
            "network": nft() is not None,
            "capabilities": sorted(self.engines.container.capabilities),
            "vm_features": self.engines.vm_features(),
            "boxes": len(boxes),
            "running": sum(box.state is BoxState.RUNNING for box in boxes),
            "images": len(self.image_store.list()),
            "volumes": len(self.store.list_volumes()),
        }

    # What its parts use.

    def spawn(self, function: Callable[..., Any], *args: Any) -> None:
        """Run a coroutine function in the background, for as long as the runtime lives. A failure is logged."""
        if self._closed or self._tasks is None:
            return
        self._tasks.start_soon(self._guarded, function, *args)

    def add(self, record: BoxRecord) -> None:
        """Record a new box as one that this runtime made."""
        if self.bounds is not None:
            reserve(self.bounds, record.spec.network, self.store.list_boxes())
            record = msgspec.structs.replace(record, bounds=self.bounds)
        self.store.add_box(record)
        self._own.add(record.id)

    def handle(self, record: BoxRecord) -> LocalBox:
        """Return the one handle that this runtime has on a box."""
        box = self._boxes.get(record.id)
        if box is None:
            box = self._boxes[record.id] = LocalBox(self, record.id, record.spec.name)
        return box

    def check_open(self) -> None:
        """Raise `RuntimeClosedError` unless the runtime is in use."""
        if self._closed or self._tasks is None:
            raise RuntimeClosedError("the runtime is closed; use it inside `async with`")

    # Private methods.

    def _made(self, box_id: str, spec: BoxSpec) -> LocalBox | None:
        """The box that was made by this id. Raises `AlreadyExistsError` when it was made otherwise."""
        record = self.store.get_box(box_id)
        if record is None:
            return None
        if record.spec != without_values(spec):
            raise AlreadyExistsError(f"a box with the id {box_id!r} exists already, and was made otherwise")
        return self.handle(record)

    def _record(self, spec: BoxSpec, image: ImageInfo, isolation: str, box_id: str) -> BoxRecord:
        now = time.time()
        settings = resolve(spec, image)
        return BoxRecord(
            id=box_id,
            spec=without_values(spec),
            sealed=self.vault.seal(spec.secrets, box_id) if spec.secrets else b"",
            image_digest=image.digest,
            state=BoxState.CONFIGURED,
            created_at=now,
            updated_at=now,
            command=settings.command,
            env=environment(spec, settings.env),
            workdir=settings.workdir,
            user=settings.user,
            stop_signal=settings.stop_signal,
            owner=self._process,
            isolation=isolation,
        )

    def _find(self, box: str) -> BoxRecord:
        found = self.store.find_boxes(check_name("the name of a box", box))
        if not found:
            raise NotFoundError(f"box {quoted(box)} does not exist")
        if len(found) > 1:
            raise InvalidArgumentError(f"{quoted(box)} is the beginning of several box ids; give more of it")
        return found[0]

    async def _trust_gateway(self, record: BoxRecord) -> None:
        """Let a box with secrets trust the gateway. A box that prevents it harms only itself."""
        try:
            with anyio.fail_after(_TRUST_SECONDS):
                await install(self.handle(record), self.vault.open(record.sealed).authority.certificate)
        except (HutchError, TimeoutError) as error:
            log.warning("box %s does not trust its gateway: %s", title(record), error)

    async def _erase(self, record: BoxRecord) -> None:
        # The record goes last: until then a crash leaves a box that can be removed again.
        await self.lives.destroy(record.id)
        await self.engines.container.remove_tree(self.home.box(record.id))
        snapshots = self.store.list_snapshots(record.id)
        self.store.remove_box(record.id)
        self._boxes.pop(record.id, None)
        self._own.discard(record.id)
        await self.disks.release(record.disks + tuple(disk for snapshot in snapshots for disk in snapshot.disks))
        self.home.lock(record.id).unlink(missing_ok=True)

    async def _stop_own(self) -> None:
        async def stop(record: BoxRecord) -> None:
            with contextlib.suppress(HutchError), anyio.move_on_after(_CLOSE_SECONDS):
                await self.lives.stop(record.id, 1.0)
                if record.spec.auto_remove:
                    async with self.records.holding(record.id) as held:
                        await self._erase(held)

        async with anyio.create_task_group() as tasks:
            for box_id in self._own:
                record = self.store.get_box(box_id)
                if record is None or record.spec.detach:
                    continue
                if record.spec.auto_remove or box_id in self.records.started:
                    tasks.start_soon(stop, record)

    async def _guarded(self, function: Callable[..., Any], *args: Any) -> None:
        try:
            await function(*args)
        except Exception:
            log.exception("a background task of the runtime failed")


async def _hold_tasks(*, task_status: TaskStatus[TaskGroup]) -> None:
    async with anyio.create_task_group() as tasks:
        task_status.started(tasks)
        await anyio.sleep_forever()
