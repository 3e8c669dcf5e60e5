"""The images that are measured with: OCI layouts, made once and kept in the cache, and a registry that serves them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers.base import PeerError, call, end_process, until
from hutch.image.apt import sources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SUITE = "bookworm"
_TAG = "1"
VARIANTS = 5
"""Images of the same Debian that differ in one file, and so share no layer: each is news to everybody."""
_READY_SECONDS = 10.0


def cache() -> Path:
    """Where the layouts are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hutch-bench"


def busybox() -> Path:
    """Return the layout of the busybox image (about 1 MB)."""
    return _cached("busybox", _fill_busybox, 1)


def debian() -> Path:
    """Return the layout of a minimal Debian in one layer (about 60 MB), in `VARIANTS` variants."""
    return _cached("debian", _fill_debian, VARIANTS)


def rootfs(layout: Path, folder: Path) -> Path:
    """Unpack a layout into ``folder`` and return its root file system."""
    call(["umoci", "unpack", "--image", f"{layout}:{_TAG}", str(folder)])
    return folder / "rootfs"


@contextlib.contextmanager
def registry(folder: Path) -> Iterator[Registry]:
    """Run a registry on the loopback interface with its data in ``folder``. Raises `PeerError`."""
    program = shutil.which("docker-registry")
    if program is None:
        raise PeerError("docker-registry is not installed")
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    configuration = folder / "config.yml"
    configuration.write_text(
        "version: 0.1\nlog: {level: error}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}}}}}\nhttp: {{addr: {address}}}\n"
    )
    with (folder / "log").open("wb") as log:
        argv = [program, "serve", str(configuration)]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until(lambda: _answers(address), _READY_SECONDS, f"the registry {address} does not answer")
        yield Registry(address)
    finally:
        end_process(process)


class Registry:
    """A registry that runs. ``address``: host and port."""

    def __init__(self, address: str) -> None:
        self.address = address

    def push(self, layout: Path, tag: str = _TAG) -> str:
        """Publish an image of a layout and return its reference."""
        reference = f"{self.address}/{layout.name}:{tag}"
        call(["skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:{tag}", f"docker://{reference}"])
        return reference


def _cached(name: str, fill: Callable[[Path], None], variants: int) -> Path:
    path = cache() / name
    if path.exists():
        return path
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as temporary:
        tree, layout = Path(temporary) / "tree", Path(temporary) / name
        tree.mkdir()
        fill(tree)
        call(["umoci", "init", "--layout", str(layout)])
        for number in range(1, variants + 1):
            (tree / "etc/variant").write_text(f"{number}\n")
            _add_image(layout, str(number), tree)
        call(["umoci", "gc", "--layout", str(layout)])
        layout.rename(path)
    return path


def _add_image(layout: Path, tag: str, tree: Path) -> None:
    image = ["--image", f"{layout}:{tag}"]
    call(["umoci", "new", *image])
    call(["umoci", "insert", *image, str(tree), "/"])
    path_variable = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    call(["umoci", "config", *image, "--config.env", path_variable, "--config.cmd", "sh"])


def _fill_busybox(tree: Path) -> None:
    program = shutil.which("busybox")
    if program is None:
        raise PeerError("busybox is not installed (package busybox-static)")
    for folder in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
        (tree / folder).mkdir()
    shutil.copy(program, tree / "bin/busybox")
    for applet in ("cat", "dd", "echo", "ls", "sh", "sleep", "true"):
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\n")


def _fill_debian(tree: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        raise PeerError("mmdebstrap is not installed")
    # The tree goes where umoci packs it from, owners and all, so this needs root.
    call(["mmdebstrap", "--mode=root", "--variant=minbase", _SUITE, str(tree), *sources(_SUITE)])


def _answers(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True
