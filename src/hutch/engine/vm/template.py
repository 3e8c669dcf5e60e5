"""Templates: machines that were booted once and saved, from which boxes are restored in a tenth of a second.

templates/<key>/memory, state     the guest's memory, mapped copy-on-write by each box, and the rest of its state

A template holds nothing of any box: it is saved before the guest takes a disk. It can be deleted at any time; boxes
that were restored from it keep the files. Whoever needs one that is missing makes it, which takes hardly longer than
to boot the box itself; who else needs it meanwhile waits for that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import msgspec

from hutch.engine.vm.launch import Files, launching
from hutch.engine.vm.machine import Plan
from hutch.errors import DeadlineError, EngineError, HutchError, StorageError
from hutch.host import files

if TYPE_CHECKING:
    from hutch.engine.vm.machine import Shape

log = logging.getLogger("hutch.engine.vm")

BOOT_SECONDS = 60.0
KVM_BOOT_SECONDS = 15.0
RETRY_SECONDS = 300.0
KEPT = 8
_LOCK_SECONDS = 120.0


def boot_seconds(shape: Shape) -> float:
    """How long a guest may take to boot."""
    return KVM_BOOT_SECONDS if shape.kvm else BOOT_SECONDS


class Template(msgspec.Struct, frozen=True):
    """An open template: descriptors of its two files. `close` them."""

    folder: Path
    memory: int
    state: int

    @classmethod
    def open(cls, folder: Path) -> Template | None:
        """Open a template for reading; ``None`` when there is none."""
        try:
            memory = os.open(folder / "memory", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            state = os.open(folder / "state", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(memory)
            return None
        return cls(folder, memory, state)

    def close(self) -> None:
        """Close the files."""
        os.close(self.memory)
        os.close(self.state)


class Templates:
    """The templates of one store."""

    def __init__(self, store: Path, agent: Path) -> None:
        self._folder = store / "templates"
        self._agent = agent
        # When not set, boxes boot.
        self.enabled = True
        # Shapes whose template failed, and until when boxes boot instead.
        self._failed: dict[str, float] = {}

    async def obtain(self, shape: Shape) -> Template | None:
        """Return the template of a shape; make it if it is missing. ``None`` when that fails."""
        if not self.enabled:
            return None
        key = await anyio.to_thread.run_sync(lambda: shape.key)
        if (found := Template.open(self._folder / key)) is not None:
            with contextlib.suppress(OSError):
                os.utime(found.folder)
            return found
        if time.monotonic() < self._failed.get(key, 0):
            return None
        try:
            await self.ensure(shape)
        except HutchError as error:
            if not isinstance(error, DeadlineError):
                self._failed[key] = time.monotonic() + RETRY_SECONDS
            log.warning("no template for VMs could be made, they boot one by one: %s", error)
            return None
        return Template.open(self._folder / key)

    async def ensure(self, shape: Shape) -> None:
        """Make the template of a shape if it is missing. Raises `EngineError`, `StorageError`, `DeadlineError`."""
        folder = self._folder / shape.key
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            async with files.locked(self._folder / f".{shape.key}.lock", timeout=_LOCK_SECONDS):
                if not (folder / "state").exists():
                    await self._make(shape, folder)
        except OSError as error:
            raise StorageError(f"cannot make the template {folder}: {error.strerror}") from error

    async def discard(self, template: Template, cause: Exception) -> None:
        """Throw a template away that proved to be of no use."""
        log.warning("the template %s is of no use and was deleted: %s", template.folder, cause)
        self._failed[template.folder.name] = time.monotonic() + RETRY_SECONDS
        with contextlib.suppress(HutchError):
            self._remove(template.folder)

    # Private methods.

    async def _make(self, shape: Shape, folder: Path) -> None:
        opened: list[int] = []
        async with files.scratch(self._folder, shape.key) as partial:
            (partial / "run").mkdir(mode=0o700)
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                opened.append(memory := os.open(partial / "memory", flags, 0o600))
                opened.append(state := os.open(partial / "state", flags, 0o600))
                os.ftruncate(memory, shape.memory_mib << 20)
                plan = Plan(memory=True, shared=True, disk=False)
                with anyio.fail_after(boot_seconds(shape)):
                    async with launching(self._agent, partial, shape, plan, Files(memory=memory)) as guest:
                        await guest.booted()
                        await guest.save(state)
            except TimeoutError:
                raise EngineError(f"the guest did not boot within {boot_seconds(shape):g} s") from None
            finally:
                for fd in opened:
                    os.close(fd)
            for path in partial.iterdir():
                if path.name not in ("memory", "state"):
                    files.remove_tree(path)
            partial.rename(folder)
        self._drop_old()

    def _drop_old(self) -> None:
        for folder in files.newest_first(self._folder.glob("[!.]*"))[KEPT:]:
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        """Under another name first, so that nobody opens a half of it."""
        away = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{files.PARTIAL}")
        with contextlib.suppress(FileNotFoundError):
            folder.rename(away)
        files.remove_tree(away)
