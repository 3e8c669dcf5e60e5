"""Two small images, as OCI layouts: hutch/python (a minimal Debian with Python) and hutch/busybox; and a registry to
serve them.

They are made from the machine's own Debian mirror, once, and kept in .cache/demo.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hutch.image.apt import sources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CACHE = Path(__file__).parent.parent / ".cache/demo"
LAYOUT = CACHE / "layout"
NAMES = ("python", "busybox")


def build(say: Callable[[str], None]) -> None:
    """Make the two images, as OCI layouts, from the machine's Debian mirror; nothing happens when they are there."""
    LAYOUT.mkdir(parents=True, exist_ok=True)
    for name, make in (("busybox", _busybox_root), ("python", _python_root)):
        layout = LAYOUT / name
        if layout.exists():
            continue
        say(f"Build the image hutch/{name}")
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="build-") as folder:
            root = Path(folder) / "root"
            command = make(root)
            partial = Path(folder) / "layout"
            _run("umoci", "init", "--layout", partial)
            _run("umoci", "new", "--image", f"{partial}:latest")
            _run("umoci", "insert", *_rootless(), "--image", f"{partial}:latest", root, "/")
            _run("umoci", "config", "--image", f"{partial}:latest", "--config.cmd", command)
            partial.rename(layout)


def _busybox_root(root: Path) -> str:
    """Make a root file system of the static busybox; returns the image's command."""
    (root / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for applet in _run("/bin/busybox", "--list").split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    for folder in ("etc", "root", "tmp", "usr", "var"):
        (root / folder).mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    return "/bin/sh"


def _python_root(root: Path) -> str:
    """Make a minimal Debian with Python; returns the image's command."""
    options = ["--variant=minbase", "--include=python3-minimal"]
    # Documentation and caches would be half of the image.
    options += [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale", "info")]
    options += ['--customize-hook=rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*']
    _run("mmdebstrap", "--quiet", *options, "bookworm", root, *sources("bookworm"))
    return "python3"


def _rootless() -> list[str]:
    """The option that umoci needs from an ordinary user."""
    return ["--rootless"] if os.geteuid() else []


@contextlib.contextmanager
def registry() -> Iterator[str]:
    """Serve a registry on a free loopback port for a while; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = CACHE / "registry.yml"
    data = CACHE / "registry"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {data}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    server = subprocess.Popen(
        ["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if time.monotonic() > deadline or server.poll() is not None:
                raise SystemExit("the registry did not start")
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def push(name: str, address: str) -> None:
    """Copy an image from its layout to the registry."""
    target = f"docker://{address}/hutch/{name}:latest"
    _run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{LAYOUT / name}:latest", target)


def _run(*words: str | Path) -> str:
    """Run a program quietly; its messages are shown when it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout
