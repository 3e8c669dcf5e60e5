"""Base images for machines without a registry, made from the machine's own apt mirror.

Debian comes from mmdebstrap, which writes a tar that goes straight into the unpacker; ``busybox`` is one static program
of a Debian package, and the few files that make a root file system of it.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio

from hutch.errors import ImageError, InvalidArgumentError
from hutch.image._tasks import together
from hutch.image.apt import sources
from hutch.types import ImageInfo, Progress

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from anyio.abc import Process

    from hutch.core.manifest import Platform
    from hutch.core.ociref import Reference
    from hutch.image.install import Installer, Report

_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_SUITE: Final = re.compile(r"[a-z][a-z0-9.-]*")
_TAIL: Final = 6
"""Lines of a failed program that are shown."""
_BUSYBOX: Final = "busybox-static"
_MAX_BUSYBOX: Final = 32 << 20


async def debian(
    installer: Installer,
    name: Reference,
    *,
    suite: str,
    packages: Sequence[str],
    platform: Platform,
    report: Report,
) -> ImageInfo:
    """Make a minimal Debian with the packages. Raises `ImageError` or `InvalidArgumentError`."""
    if not _SUITE.fullmatch(suite):
        raise InvalidArgumentError(f"{suite!r} is not the name of a Debian suite")
    for package in packages:
        if not _PACKAGE.fullmatch(package):
            raise InvalidArgumentError(f"{package!r} is not the name of a Debian package")
    program = _need("mmdebstrap", "mmdebstrap")
    include = [f"--include={','.join(packages)}"] if packages else []
    argv = [program, "--variant=minbase", "--format=tar", *include, suite, "-", *sources(suite)]
    environment = {**os.environ, **await _proxies(), "LC_ALL": "C.UTF-8"}
    made: list[ImageInfo] = []
    tail: list[str] = []
    silent = anyio.Event()
    async with await anyio.open_process(argv, stdin=subprocess.DEVNULL, env=environment) as process:

        async def output() -> AsyncGenerator[bytes]:
            assert process.stdout is not None
            async for chunk in process.stdout:
                yield chunk
            await silent.wait()
            if await process.wait() != 0:
                raise ImageError("mmdebstrap failed: " + "; ".join(tail[-_TAIL:])[-800:])

        async def install() -> None:
            made.append(await installer.rootfs(output(), platform=platform, name=name, report=report))

        async def listen() -> None:
            try:
                await _listen(process, tail, report)
            finally:
                silent.set()

        await together(install, listen)
    return made[0]


async def _listen(process: Process, tail: list[str], report: Report) -> None:
    """Turn what mmdebstrap says into progress."""
    assert process.stderr is not None
    rest = b""
    async for chunk in process.stderr:
        *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        for raw in lines:
            line = raw.decode("utf-8", "replace").strip()
            if line:
                tail.append(line)
                del tail[:-_TAIL]
            if line.startswith("I: "):
                report(Progress(phase="bootstrap", item=line.removeprefix("I: ").rstrip(".")))


async def _proxies() -> dict[str, str]:
    """Return the proxies that the machine's apt uses, as environment variables: so the image does not learn of them."""
    found: dict[str, str] = {}
    for scheme in ("http", "https"):
        argv = ["apt-config", "dump", "--format=%v", f"Acquire::{scheme}::Proxy"]
        value = (await anyio.run_process(argv, check=False)).stdout.decode("utf-8", "replace").strip()
        if value:
            found[f"{scheme}_proxy"] = value
    return found


async def busybox(installer: Installer, name: Reference, *, platform: Platform, report: Report) -> ImageInfo:
    """Make an image of the static busybox. Raises `ImageError`."""
    report(Progress(phase="bootstrap", item=f"fetching {_BUSYBOX}"))
    program = await _busybox_program()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "busybox"
        path.write_bytes(program)
        path.chmod(0o700)
        listed = await anyio.run_process([str(path), "--list"], check=False)
    applets = [applet for applet in listed.stdout.decode().split() if re.fullmatch(r"[a-z0-9_.\[-]+", applet)]
    if not applets:
        raise ImageError(f"the program in {_BUSYBOX} does not run here")

    async def output() -> AsyncGenerator[bytes]:
        yield busybox_tar(program, applets)

    return await installer.rootfs(output(), platform=platform, name=name, report=report)


def busybox_tar(program: bytes, applets: Sequence[str]) -> bytes:
    """Return the root file system as a tar; the same input gives the same bytes."""
    files = {
        "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
        "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
        "bin/busybox": program,
    }
    folders = {"bin": 0o755, "dev": 0o755, "etc": 0o755, "proc": 0o755, "root": 0o700, "sys": 0o755, "tmp": 0o1777}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, mode in folders.items():
            entry = tarfile.TarInfo(path)
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            archive.addfile(entry)
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o755 if path.startswith("bin/") else 0o644
            archive.addfile(entry, io.BytesIO(content))
        for applet in sorted(set(applets) - {"busybox"}):
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.mode, entry.linkname = tarfile.LNKTYPE, 0o755, "bin/busybox"
            archive.addfile(entry)
    return out.getvalue()


async def _busybox_program() -> bytes:
    """Return the program: the installed one, or that of a package fetched by apt."""
    installed = await anyio.run_process(["dpkg-query", "-L", _BUSYBOX], check=False)
    for line in installed.stdout.decode("utf-8", "replace").splitlines():
        if line.endswith("/busybox") and Path(line).is_file():
            return Path(line).read_bytes()
    apt, dpkg = _need("apt-get", "apt"), _need("dpkg-deb", "dpkg")
    with tempfile.TemporaryDirectory() as folder:
        fetched = await anyio.run_process([apt, "-qq", "download", _BUSYBOX], check=False, cwd=folder)
        packages = list(Path(folder).glob("*.deb"))
        if fetched.returncode != 0 or not packages:
            cause = fetched.stderr.decode("utf-8", "replace").strip()[-500:]
            raise ImageError(f"{_BUSYBOX} cannot be fetched: {cause}; check apt's sources, or run `apt-get update`")
        contents = await anyio.run_process([dpkg, "--fsys-tarfile", str(packages[0])])
    with tarfile.open(fileobj=io.BytesIO(contents.stdout)) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith("bin/busybox") else None
            if file is not None and member.size <= _MAX_BUSYBOX:
                return file.read()
    raise ImageError(f"the package {_BUSYBOX} has no busybox in it")


def _need(program: str, package: str) -> str:
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise ImageError(f"{program} is missing; install the Debian package {package}")
    return path
