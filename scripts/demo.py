"""The demonstration: build two images, serve them from a loopback registry, pull one, run a Python program in a box,
copy a file out.

usage: demo.py        What is built is kept in .cache/demo, so later runs are quick. Both images end up in the
default home.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache/demo"
LAYOUT = CACHE / "layout"
HUTCH = ROOT / ".venv/bin/hutch"
PROGRAM = """\
import os, platform, sys
print("Hello from", platform.node(), "on Python", platform.python_version())
print("I am uid", os.getuid(), "and pid", os.getpid(), "and see", len(os.listdir("/proc/self/fd")) - 1, "open files")
with open("/root/result.txt", "w") as file:
    file.write("the answer is %d\\n" % sum(range(1, 9), 6))
sys.exit(7)
"""


def main() -> int:
    """Run the demonstration; returns the exit code."""
    build()
    with registry() as address:
        for name in ("python", "busybox"):
            push(name, address)
        say("Pull both from the registry")
        for name in ("python", "busybox"):
            hutch("image", "pull", f"{address}/hutch/{name}:latest")
    # Under names that do not depend on the registry's port.
    for name in ("python", "busybox"):
        hutch("image", "import", "--quiet", str(LAYOUT / name), f"hutch/{name}:latest", show=False)
        hutch("image", "rm", f"{address}/hutch/{name}:latest", show=False)
    hutch("image", "ls")

    say("Run a Python program in a box: live output, exact exit code")
    box = hutch("create", "hutch/python", show=False)
    code = subprocess.run([HUTCH, "exec", box, "--", "python3", "-c", PROGRAM], check=False).returncode
    print(f"exit code {code}")

    say("Copy a file out")
    with tempfile.TemporaryDirectory() as folder:
        hutch("cp", f"{box}:/root/result.txt", folder)
        text = (Path(folder) / "result.txt").read_text()
    print(f"result.txt: {text}", end="")

    say("What the box is, and that nothing of it stays")
    hutch("ls")
    hutch("rm", "-f", box, show=False)
    if code != 7 or text != "the answer is 42\n":
        print("the demonstration failed: the program's exit code or file is not what it should be", file=sys.stderr)
        return 1
    print(f"\nThat was it. Now try:  {HUTCH.relative_to(ROOT)} run --rm -it hutch/python bash")
    return 0


def build() -> None:
    """Make the two images, as OCI layouts, from the machine's Debian mirror; nothing happens when they are there."""
    LAYOUT.mkdir(parents=True, exist_ok=True)
    for name, make in (("busybox", busybox_root), ("python", python_root)):
        layout = LAYOUT / name
        if layout.exists():
            continue
        say(f"Build the image hutch/{name}")
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="build-") as folder:
            root = Path(folder) / "root"
            command = make(root)
            partial = Path(folder) / "layout"
            run("umoci", "init", "--layout", partial)
            run("umoci", "new", "--image", f"{partial}:latest")
            run("umoci", "insert", *rootless(), "--image", f"{partial}:latest", root, "/")
            run("umoci", "config", "--image", f"{partial}:latest", "--config.cmd", command)
            partial.rename(layout)


def busybox_root(root: Path) -> str:
    """Make a root file system of the static busybox; returns the image's command."""
    (root / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for applet in run("/bin/busybox", "--list").split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    for folder in ("etc", "root", "tmp", "usr", "var"):
        (root / folder).mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    (root / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    return "/bin/sh"


def python_root(root: Path) -> str:
    """Make a minimal Debian with Python; returns the image's command."""
    options = ["--variant=minbase", "--include=python3-minimal"]
    # Documentation and caches would be half of the image.
    options += [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale", "info")]
    options += ['--customize-hook=rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*']
    run("mmdebstrap", "--quiet", *options, "bookworm", root, *mirrors())
    return "python3"


def mirrors() -> list[str]:
    """The machine's own package sources, which mmdebstrap would otherwise replace by the default ones."""
    from hutch.image.apt import sources

    return sources("bookworm")


def rootless() -> list[str]:
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
    run("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{LAYOUT / name}:latest", target)


def hutch(*words: str, show: bool = True) -> str:
    """Run the command line as a user would, and show it; returns what it printed."""
    if show:
        print(f"$ hutch {' '.join(words)}", flush=True)
    done = subprocess.run([HUTCH, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"hutch {words[0]} failed")
    if show:
        print(done.stdout, end="")
    return done.stdout.strip()


def run(*words: str | Path) -> str:
    """Run a program quietly; its messages are shown when it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
