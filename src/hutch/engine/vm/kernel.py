"""The kernel of all VMs, and the initramfs that makes the agent its first program.

kernels/<name>/vmlinuz, stub, modules/    a kernel, its beginning, and those of its modules that a box needs
kernels/<name>/initrd-<digest>            with this agent in it
kernels/current                           the name of the one in use
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread
import msgspec

from hutch.engine.vm import cpio
from hutch.errors import EngineError, InvalidArgumentError, StorageError
from hutch.host import command, files
from hutch.types import Progress

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

META_PACKAGE = "linux-image-cloud-amd64"
# In the order of loading: before the driver of the port, and after it, when no driver takes devices any more. virtio
# needs virtio_ring, although in some kernels it does not say so.
FIRST = ("virtio_ring", "virtio", "virtio_pci", "virtio_balloon", "virtio_console")
SECOND = ("crc32c_generic", "crc32c_intel", "virtio_blk", "virtio_net", "ext4", "overlay", "fuse", "tun")
_CHOICE = hashlib.sha256(repr((FIRST, SECOND)).encode()).hexdigest()[:8]
"""Ends the name of a fetched kernel: one with other modules is fetched again."""
_OWN = "own-"
_LOCK_SECONDS = 600.0
_PACKAGE = re.compile(r"linux-image-[0-9][0-9a-z.+-]*")
_MODULE = re.compile(r"(?:.*/)?([0-9A-Za-z_-]+)\.ko(\.xz|\.zst|\.gz)?")
_MAX_MODULE = 64 << 20
_STUB = 64 << 10


class Kernel(msgspec.Struct, frozen=True):
    """A kernel that is ready to boot. ``key`` changes whenever anything in it does."""

    name: str
    image: Path
    stub: Path
    """The first part of it."""
    initrd: Path
    key: str


class Kernels:
    """The kernels of one store."""

    def __init__(self, store: Path, agent: Path) -> None:
        self._folder = store / "kernels"
        self._agent = agent

    def current(self) -> Kernel | None:
        """Return the kernel in use, ``None`` when none was prepared."""
        try:
            name = (self._folder / "current").read_text(errors="replace").strip()
        except OSError:
            return None
        folder = self._folder / name
        fits = name.startswith(_OWN) or name.endswith(f"-{_CHOICE}")
        return self._complete(folder) if fits and (folder / "vmlinuz").exists() else None

    async def ensure(self, report: Callable[[Progress], None]) -> Kernel:
        """Return the kernel in use; fetch Debian's if there is none. Raises `EngineError`, `StorageError`."""
        if (found := self.current()) is not None:
            return found
        self._folder.mkdir(parents=True, exist_ok=True)
        async with files.locked(self._folder / "lock", timeout=_LOCK_SECONDS):
            return self.current() or await self._fetch(report)

    async def renew(self, report: Callable[[Progress], None]) -> Kernel:
        """Fetch Debian's newest cloud kernel and use it from now on. Raises `EngineError`, `StorageError`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        async with files.locked(self._folder / "lock", timeout=_LOCK_SECONDS):
            return await self._fetch(report)

    async def use(self, image: Path, modules: Path | None) -> Kernel:
        """Use a kernel of the user's own from now on. ``modules``: the folder below which its modules lie; what is
        not found there must be part of the kernel.

        Raises `InvalidArgumentError`, `StorageError`.
        """
        try:
            data = image.read_bytes()
            chosen = _choose(_reader({} if modules is None else {str(path): path for path in modules.rglob("*.ko*")}))
        except OSError as error:
            raise InvalidArgumentError(f"the kernel cannot be read: {error}") from error
        if data[0x202:0x206] != b"HdrS":
            raise InvalidArgumentError(f"{image} is no Linux kernel for x86 (a bzImage, e.g. /boot/vmlinuz-…)")
        self._folder.mkdir(parents=True, exist_ok=True)
        async with files.locked(self._folder / "lock", timeout=_LOCK_SECONDS):
            parts = [data, *(module for part in chosen.values() for module in part.values())]
            digest = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
            return self._install(f"{_OWN}{digest}", data, chosen)

    # Private methods.

    async def _fetch(self, report: Callable[[Progress], None]) -> Kernel:
        try:
            package = await _package()
            async with files.scratch(self._folder, "fetch") as scratch:
                report(Progress(phase="download", item=package))
                await command.run(["apt-get", "-qq", "download", package], f"fetch {package}", cwd=scratch)
                archive = next(scratch.glob("*.deb"))
                version = archive.name.removesuffix(".deb").replace("%3a", "_")
                report(Progress(phase="unpack", item=version))
                image, found = await anyio.to_thread.run_sync(_unpack, archive)
                chosen = _choose(_reader(found))
        except StorageError as error:
            raise EngineError(
                f"no kernel for VMs can be fetched: {error}; check apt's sources, run `apt-get update`, or give a "
                "kernel: hutch setup vm --kernel FILE --modules FOLDER"
            ) from error
        kernel = self._install(f"{version}-{_CHOICE}", image, chosen)
        report(Progress(phase="done", item=version))
        return kernel

    def _install(self, name: str, image: bytes, chosen: Mapping[str, Mapping[str, bytes]]) -> Kernel:
        folder = self._folder / name
        if not (folder / "vmlinuz").exists():
            partial = self._folder / f".{name}"
            files.remove_tree(partial)
            (partial / "modules").mkdir(parents=True)
            for part, modules in chosen.items():
                for module, data in modules.items():
                    (partial / "modules" / module).write_bytes(data)
                (partial / "modules" / part).write_text("".join(f"{module}\n" for module in modules))
            (partial / "vmlinuz").write_bytes(image)
            (partial / "stub").write_bytes(image[:_STUB])
            for path in partial.rglob("*"):  # the emulator's user reads it
                path.chmod(0o755 if path.is_dir() else 0o644)
            partial.chmod(0o755)
            partial.rename(folder)
        files.atomic_write(self._folder / "current", name.encode(), mode=0o644)
        return self._complete(folder)

    def _complete(self, folder: Path) -> Kernel:
        """Return the kernel with the initramfs of today's agent, which is made when it is missing."""
        agent = self._agent.read_bytes()
        digest = hashlib.sha256(agent).hexdigest()[:16]
        initrd = folder / f"initrd-{digest}"
        if not initrd.exists():
            files.atomic_write(initrd, _initrd(folder / "modules", agent), mode=0o644)
        return Kernel(folder.name, folder / "vmlinuz", folder / "stub", initrd, f"{folder.name}-{digest}")


def _initrd(modules: Path, agent: bytes) -> bytes:
    entries = {
        **dict.fromkeys(("dev", "modules", "proc", "sys"), (stat.S_IFDIR | 493, b"")),
        "init": (stat.S_IFREG | 0o755, agent),
        **{f"modules/{path.name}": (stat.S_IFREG | 0o644, path.read_bytes()) for path in sorted(modules.iterdir())},
    }
    return cpio.archive(entries)


async def _package() -> str:
    """Return the package that the meta package stands for."""
    output = await command.run(["apt-cache", "depends", "--important", META_PACKAGE], f"find {META_PACKAGE}")
    for line in output.decode("utf-8", "replace").splitlines():
        kind, _, name = line.strip().partition(": ")
        if kind == "Depends" and _PACKAGE.fullmatch(name):
            return name
    raise EngineError(f"apt knows no kernel package for {META_PACKAGE}; run `apt-get update`")


def _unpack(archive: Path) -> tuple[bytes, dict[str, bytes]]:
    """Return the kernel image of a package, and its modules by name."""
    image = b""
    found: dict[str, bytes] = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as contents:
            for member in contents:
                if not member.isreg() or member.size > _MAX_MODULE:
                    continue
                if "/boot/vmlinuz-" in member.name or _MODULE.fullmatch(member.name):
                    file = contents.extractfile(member)
                    data = file.read() if file else b""
                    if "/boot/" in member.name:
                        image = data
                    else:
                        found[member.name] = data
    if not image:
        raise EngineError(f"the package {archive.name} has no kernel in it")
    return image, found


def _reader(found: Mapping[str, bytes | Path]) -> Callable[[str], bytes | None]:
    """Return what reads a module by the kernel's name for it. ``found``: path → contents, or where they are."""
    names = {}
    for path, source in found.items():
        if match := _MODULE.fullmatch(path):
            names[match[1].replace("-", "_")] = (source, match[2])

    def read(name: str) -> bytes | None:
        if name not in names:
            return None
        source, suffix = names[name]
        return _plain(source if isinstance(source, bytes) else source.read_bytes(), suffix)

    return read


def _plain(data: bytes, suffix: str | None) -> bytes:
    match suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return gzip.decompress(data)
        case ".zst":
            return zstd.decompress(data)
    return data


def _choose(read: Callable[[str], bytes | None]) -> dict[str, dict[str, bytes]]:
    """Return the modules that must be loaded, in two parts, each behind what it needs. What is not found is part of
    the kernel."""
    chosen: dict[str, dict[str, bytes]] = {"first": {}, "second": {}}

    def add(name: str, part: dict[str, bytes]) -> None:
        if any(name in modules for modules in chosen.values()) or (data := read(name)) is None:
            return
        match = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in match[1].decode().split(",") if match else ():
            add(needed.replace("-", "_"), part)
        part[name] = data

    for wanted, part in ((FIRST, "first"), (SECOND, "second")):
        for name in wanted:
            add(name, chosen[part])
    return chosen
