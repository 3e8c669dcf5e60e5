"""A small root file system for boxes under test: busybox, linked statically."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# fmt: off
APPLETS = (
    "[", "ash", "awk", "base64", "cat", "chmod", "chown", "cp", "cut", "date", "dd", "df", "du", "echo", "env",
    "expr", "false", "find", "free", "grep", "head", "hostname", "id", "ifconfig", "ip", "kill", "ln", "ls",
    "md5sum", "mkdir", "mkfifo", "mknod", "mount", "mv", "nc", "nproc", "od", "printf", "ps", "pwd", "readlink",
    "realpath", "rm", "rmdir", "sed", "seq", "sh", "sha256sum", "sleep", "sort", "stat", "stty", "tail", "tar",
    "tee", "test", "touch", "tr", "true", "tty", "umount", "uname", "uniq", "unlink", "wc", "which", "whoami",
    "xargs", "yes",
)
# fmt: on

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
user:x:1000:1000:user:/home/user:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
"""
GROUP = """\
root:x:0:
user:x:1000:
staff:x:50:user
nogroup:x:65534:
"""


def build(directory: Path) -> Path:
    """Fill a folder with the tree and return it. Owners are the calling user's (box root's as an ordinary user)."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise RuntimeError("busybox (statically linked) is needed for the tests: apt-get install busybox-static")
    for name in ("bin", "etc", "home/user", "root", "tmp", "usr/bin", "var/tmp"):
        (directory / name).mkdir(parents=True)
    shutil.copy(busybox, directory / "bin/busybox")
    for name in APPLETS:
        os.link(directory / "bin/busybox", directory / "bin" / name)
    (directory / "etc/passwd").write_text(PASSWD)
    (directory / "etc/group").write_text(GROUP)
    (directory / "etc/release").write_text("hutch test image\n")
    for name in ("tmp", "var/tmp"):
        (directory / name).chmod(0o1777)
    (directory / "root").chmod(0o700)
    if os.geteuid() == 0:
        os.chown(directory / "home/user", 1000, 1000)
    return directory
