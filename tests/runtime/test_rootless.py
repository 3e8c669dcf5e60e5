"""Boxes of an ordinary user, from creation to removal; and a package manager in one."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import anyio
import pytest

from tests import debian
from tests.ordinary_user import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.ordinary_user import OrdinaryUser

pytestmark = pytest.mark.root

LIFE = """
import os, pathlib, sys, anyio, hutch, hutch.errors
from hutch.host import mapping
from tests import rootfs

async def main(here):
    async with hutch.Runtime.local(here / "home") as runtime:
        await runtime.images.load(rootfs.build(here / "image"), reference="busybox:test")
        box = await runtime.create("busybox:test", disk_gb=1)
        print("ids", mapping.current().count > 65536 // 2)
        result = await box.run("sh", "-c", "id -u; echo owned > /owned; chown 1000:50 /owned; rm /etc/release")
        print(result.exit_code, result.stdout, "disk" in (await box.info()).unenforced)
        await box.files.write("/data/file", b"from the host", mode=0o640)
        print(await box.files.read("/data/file"), (await box.files.stat("/data/file")).mode & 0o777)
        await box.files.get("/data", here / "back")
        print((here / "back/file").read_bytes())
        await box.stop()
        await box.snapshots.create("stopped")
        await box.start()
        # The root of the box belongs to another of its users: the user of the host may not look into it.
        await box.run("sh", "-c", "echo later > /later; chown 1000 /; chmod 700 /")
        try:
            clone = await box.clone("clone")
        except hutch.errors.UnsupportedError:  # nothing can freeze it here; it goes on
            assert (await box.run("true")).exit_code == 0
            await box.stop()
            clone = await box.clone("clone")
            await box.start()
        look = "stat -c '%u:%g' /owned; cat /owned /later; test -e /etc/release || echo gone"
        print((await clone.run("sh", "-c", look)).text.split())
        await box.stop()
        await box.snapshots.create("closed")
        await box.start()
        print((await box.run("sh", "-c", look)).text.split(), (await box.stats()).disk_bytes > 0)
        await box.stop()
        await box.snapshots.restore("stopped")
        await box.start()
        print((await box.run("ls", "/later")).exit_code, (await box.run("cat", "/owned")).text.strip())
        await box.stop()
        await box.export(here / "box.tar")
        twin = await runtime.import_box(here / "box.tar", name="twin")
        print((await twin.run("stat", "-c", "%u:%g", "/owned")).text.strip())
        pids = [(await each.info()).pid for each in (box, clone, twin)]
        for each in (box, clone, twin):
            await each.remove(force=True)
        home = here / "home"
        print([sorted(os.listdir(home / name)) for name in ("boxes", "disks")])
        print([pid for pid in pids if pid and os.path.exists(f"/proc/{pid}/root/.")])

anyio.run(main, pathlib.Path(sys.argv[1]))
"""


def test_the_life_of_a_box(ordinary_user: OrdinaryUser) -> None:
    output = ordinary_user.run("-c", LIFE, str(ordinary_user.folder("life")))
    assert output.splitlines() == [
        "ids True",
        r"0 b'0\n' True",
        f"b'from the host' {0o640}",
        "b'from the host'",
        "['1000:50', 'owned', 'later', 'gone']",
        "['1000:50', 'owned', 'later', 'gone'] True",
        "1 owned",
        "1000:50",
        "[[], []]",
        "[]",
    ]


INSTALL = """
import pathlib, sys, anyio, hutch

async def main(here):
    async with hutch.Runtime.local(here / "home") as runtime:
        await runtime.images.load(here / "layout", reference="debian:test")
        box = await runtime.create("debian:test")
        await box.files.put(here / "hutch-probe.deb", "/tmp/hutch-probe.deb")
        result = await box.run("apt-get", "install", "-y", "/tmp/hutch-probe.deb")
        assert result.exit_code == 0, (result.stdout, result.stderr)
        await box.restart()
        result = await box.run(
            "sh",
            "-c",
            "dpkg-query -W -f '${Status} ${Version}\\n' hutch-probe; stat -c '%U:%G %a' /srv/probe; cat /srv/probe",
        )
        print(result.text, end="")
        print((await box.run("apt-get", "purge", "-y", "hutch-probe")).exit_code)
        await box.remove(force=True)

anyio.run(main, pathlib.Path(sys.argv[1]))
"""

CONTROL = """\
Package: hutch-probe
Version: 1.0
Architecture: all
Maintainer: Nobody <nobody@example.org>
Description: a file that belongs to another user
"""


def _package(target: Path, scratch: Path) -> None:
    tree = scratch / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(CONTROL)
    (tree / "DEBIAN/postinst").write_text("#!/bin/sh\nset -e\nchown 33:33 /srv/probe\nchmod 640 /srv/probe\n")
    (tree / "DEBIAN/postinst").chmod(0o755)
    (tree / "srv").mkdir()
    (tree / "srv/probe").write_text("installed\n")
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, target], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_package_is_installed(ordinary_user: OrdinaryUser, tmp_path: Path) -> None:
    """apt and dpkg change owners, and drop privileges to a user of their own."""
    here = ordinary_user.folder("debian")
    demo = ROOT / ".cache/demo/layout/python"
    shutil.copytree(demo if demo.is_dir() else anyio.run(debian.layout), here / "layout")
    _package(here / "hutch-probe.deb", tmp_path)
    subprocess.run(["chmod", "-R", "a+rX", here], check=True)
    output = ordinary_user.run("-c", INSTALL, str(here), seconds=200)
    assert output.splitlines() == ["install ok installed 1.0", "www-data:www-data 640", "installed", "0"]
