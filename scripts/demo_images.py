"""A registry on loopback with two images: ``debian:demo`` (with Python) and ``busybox:demo``.

    python scripts/demo_images.py [CACHE]     serve until standard input ends; the first line printed is HOST:PORT

The images are made from this machine's own apt configuration, once, and kept in CACHE (default: .cache/demo).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from hutch.image import ImageStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hutch.types import Progress

CACHE = Path(__file__).parent.parent / ".cache/demo"
IMAGES = {"debian": "python3", "busybox": "/bin/sh"}
PACKAGES = ("python3-minimal",)
START_TIMEOUT = 20.0


@contextmanager
def served(cache: Path = CACHE) -> Iterator[str]:
    """Yield the ``host:port`` of a registry that has the images; the first time it takes half a minute to make them."""
    cache.mkdir(parents=True, exist_ok=True)
    with _registry(cache) as host:
        if not (cache / "pushed").exists():
            layout = _layout(cache)
            for name in IMAGES:
                target = f"docker://{host}/{name}:demo"
                _run("skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:{name}", target)
            (cache / "pushed").touch()
        yield host


def _layout(cache: Path) -> Path:
    """Make an OCI layout with both images."""
    layout = cache / "oci"
    if not (layout / "done").exists():
        shutil.rmtree(layout, ignore_errors=True)
        _run("umoci", "init", "--layout", str(layout))
        for name, folder in anyio.run(_trees, cache / "store").items():
            image = f"{layout}:{name}"
            _run("umoci", "new", "--image", image)
            _run("umoci", "insert", "--image", image, str(folder), "/")
            path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            _run("umoci", "config", "--image", image, "--config.cmd", IMAGES[name], "--config.env", path)
        (layout / "done").touch()
    return layout


async def _trees(folder: Path) -> dict[str, Path]:
    store = ImageStore(folder)
    busybox = await store.bootstrap(reference="busybox:demo", flavour="busybox", progress=_say)
    debian = await store.bootstrap(reference="debian:demo", packages=PACKAGES, progress=_say)
    return {"busybox": store.layer_paths(busybox)[0], "debian": store.layer_paths(debian)[0]}


def _say(step: Progress) -> None:
    if step.phase == "bootstrap":
        print(f"  {step.item}", file=sys.stderr, flush=True)


@contextmanager
def _registry(cache: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(cache / "registry")}},
        "http": {"addr": host},
    }
    (cache / "registry.json").write_text(json.dumps(config))  # JSON is YAML
    with (cache / "registry.log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(cache / "registry.json")], stdout=log, stderr=log)
    try:
        _await_port(host, process, cache / "registry.log")
        yield host
    finally:
        process.terminate()
        process.wait(timeout=10)


def _await_port(host: str, process: subprocess.Popen[bytes], log: Path) -> None:
    address, _, port = host.partition(":")
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection((address, int(port)), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise SystemExit(f"docker-registry does not start: {log.read_text()[-500:]}")


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(argv[:2])} failed: {done.stderr.strip()[-500:]}")


def main() -> None:
    """Serve until standard input ends."""
    if os.geteuid() != 0:
        raise SystemExit("making the images needs root")
    with served(Path(sys.argv[1]) if len(sys.argv) > 1 else CACHE) as host:
        print(host, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
