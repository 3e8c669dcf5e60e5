"""Folders of the host in VMs: what the server of their files does, and what it lets nobody do."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hutch.engine.base import MountPlan, Started
from hutch.host import mapping
from tests.engine.boxes import Box, plan, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hutch.engine.container import ContainerEngine
    from hutch.engine.vm import VmEngine

pytestmark = pytest.mark.anyio

STARTER = """
import anyio, pathlib, pickle, signal, sys
from hutch.engine.vm import VmEngine
async def main():
    await VmEngine(pathlib.Path(sys.argv[1])).start(pickle.loads(bytes.fromhex(sys.argv[2])))
    print("started", flush=True)
    signal.pause()
anyio.run(main)
"""


def children(pid: int) -> set[int]:
    """The children of a process."""
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def server(pid: int) -> int:
    """What serves the files of the box with this keeper."""
    (found,) = (child for child in children(pid) if Path(f"/proc/{child}/comm").read_text() == "box-files\n")
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for a box; next to it is what the box must not reach."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("secret\n")
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.fixture
async def box(vm: VmEngine, vm_store: Path, rootfs: Path, tmp_path: Path, folder: Path) -> AsyncIterator[Box]:
    """A box with the folder at /data, and read-only at /look, whose creator was killed."""
    mounts = [MountPlan(folder, "/data"), MountPlan(folder, "/look", read_only=True)]
    box_plan = plan(tmp_path / "box", rootfs, mounts=mounts)
    argv = [sys.executable, "-c", STARTER, str(vm_store), pickle.dumps(box_plan).hex()]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as creator:
        assert creator.stdout is not None and creator.stdout.readline() == "started\n"
        creator.kill()
    found = vm.observe(box_plan.directory)
    assert found.pid is not None
    yield Box(box_plan.directory, box_plan, Started(pid=found.pid), vm)
    await vm.kill(box_plan.directory)


async def test_both_sides_see_each_other(
    box: Box, folder: Path, container: ContainerEngine, rootfs: Path, tmp_path: Path
) -> None:
    """At once, also by way of files that are open; with owners, modes and links."""
    (folder / "log").write_text("one\n")
    for number in range(20):
        (folder / "log").write_text(f"{number}\n")
        assert (await box.sh("cat /data/log /look/log")).out == f"{number}\n" * 2
        await box.sh(f"echo {number} >> /data/back")
        assert (folder / "back").read_text().splitlines()[-1] == str(number)
    output = await box.sh(
        "cd /data; mkdir -p a/b; echo text > a/b/f; chmod 1770 a; ln a/b/f hard; ln -s a/b/f soft; mkfifo p;"
        "mv a/b a/c; mv a/c/f a/c/g; truncate -s 3 a/c/g; chmod 4751 hard; stat -c '%h %s %a' hard;"
        "exec 4<> gone; rm gone; echo kept >&4; cat /proc/self/fd/4; ls -l /proc/self/fd/4 | grep -c deleted;"
        "mknod null c 1 3 2>/dev/null || echo no; df . | wc -l; rmdir a 2>/dev/null || echo full"
    )
    assert output.out == "2 3 4751\nkept\n1\nno\n2\nfull\n", output
    assert sorted(os.listdir(folder)) == ["a", "back", "hard", "log", "p", "soft"]
    status = (folder / "hard").stat()
    assert (status.st_mode & 0o7777, status.st_size, status.st_nlink) == (0o4751, 3, 2)
    assert status.st_mtime == (folder / "a/c/g").stat().st_mtime and status.st_mtime > 981_000_000
    assert (folder / "a").stat().st_mode & 0o7777 == 0o1770
    assert (folder / "soft").readlink() == Path("a/b/f")
    if mapping.current().count > 2000:
        assert (await box.sh("touch /data/mine", user="user")).status != 0
        await box.sh("chmod 777 /data; chown 7:8 /data/log")
        output = await box.sh("umask 27; echo mine > /data/mine; chown 7:8 /data/mine || echo no", user="user")
        assert output.out == "no\n", output
        async with running(container, plan(tmp_path / "c", rootfs, mounts=[MountPlan(folder, "/data")])) as other:
            seen = "stat -c '%n %u:%g %a' /data/mine /data/log; echo more >> /data/back"
            assert (await other.sh(seen)).out == "/data/mine 1000:1000 640\n/data/log 7:8 644\n"
        assert (await box.sh("tail -n 1 /data/back; stat -c %u /data/mine")).out == "more\n1000\n"


async def test_much_is_carried_whole(box: Box, folder: Path) -> None:
    """Data, names and messages of every size, by several programs at once."""
    (folder / "in").write_bytes(data := os.urandom(300_001))
    copies = "for i in 1 2 3; do cp /look/in /data/out$i & done; wait; md5sum /data/in /data/out?"
    names = "mkdir /data/many; cd /data/many; for i in $(seq 60); do : > $i-$(printf %0200d 0); done; ls | wc -l"
    output = await box.sh(f"{copies}; {names}; touch $(printf %0256d 0) || echo long", timeout=40)
    *sums, count, last = output.out.splitlines()
    assert len(sums) == 4 and len({line.split()[0] for line in sums}) == 1, output
    assert (count, last) == ("60", "long")
    assert all((folder / f"out{number}").read_bytes() == data for number in (1, 2, 3))
    assert len(os.listdir(folder / "many")) == 60


async def test_links_lead_nowhere(box: Box, folder: Path, tmp_path: Path) -> None:
    """A name may become a link between two looks at it: also then the host follows none."""
    (folder / "d").mkdir()
    (folder / "d/file").write_text("inside\n")
    outside = tmp_path / "outside"
    (folder / "up").symlink_to("../outside/file")
    (folder / "away").symlink_to(outside)
    await box.sh(f"mkdir -p {outside}; echo own > {outside}/file; echo own > /outside 2>/dev/null")
    output = await box.sh("cat /data/away/file; cat /data/up 2>/dev/null; cat /data/../data/d/file")
    assert output.out == "own\ninside\n"
    await box.sh("echo leak > /data/away/file; echo leak > /data/up; chmod 777 /data/away/file; chown 5 /data/away")
    await box.spawn(
        "cd /data/d; exec 3< file; touch /data/ready; while ! test -e /data/go; do :; done;"
        "cat file ../outside/file; echo leak > file; echo leak > new; cat <&3; touch /data/done"
    )
    while not (folder / "ready").exists():
        await box.sh("true")
    (folder / "d").rename(folder / "moved")
    (folder / "d").symlink_to(outside)
    (folder / "go").touch()
    while not (folder / "done").exists():
        await box.sh("true")
    assert (outside / "file").read_text() == "secret\n"
    assert os.listdir(outside) == ["file"]
    assert (outside / "file").stat().st_mode & 0o777 == 0o644


async def test_the_server_has_nothing_but_the_mounts(box: Box, folder: Path) -> None:
    pid = server(box.started.pid)
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    uids = mapping.current().uid_map.split()[1]
    assert fields["Uid"].split()[0] == (uids if os.geteuid() == 0 else str(os.geteuid()))
    assert (fields["Seccomp"], fields["NoNewPrivs"], fields["CapEff"]) == ("2", "1", "000000000000001b")
    assert fields["Groups"].strip() == "" or os.geteuid() != 0
    if os.geteuid() == 0:
        assert sorted(os.listdir(f"/proc/{pid}/root")) == ["0", "1"]
        (emulator,) = children(box.started.pid) - {pid}
        assert os.listdir(f"/proc/{emulator}/root/share") == []
        opened = {str(link.readlink()).partition(":")[0] for link in Path(f"/proc/{pid}/fd").iterdir()}
        assert opened == {"socket", "/"}


async def test_what_is_taken_away_gives_errors(box: Box, folder: Path) -> None:
    """The folder is removed, then the server dies: the box lives on."""
    (folder / "file").write_text("text\n")
    await box.spawn(
        "exec 3< /data/file; touch /data/ready; while test -e /data/file; do :; done; cat <&3 > /kept; touch /tried"
    )
    while not (folder / "ready").exists():
        await box.sh("true")
    shutil.rmtree(folder)
    output = await box.sh(
        "while ! test -e /tried; do :; done; cat /kept /data/file; echo x > /data/new; ls /data; echo alive"
    )
    assert output.out == "text\nalive\n", output
    os.kill(server(box.started.pid), signal.SIGKILL)
    output = await box.sh("ls /data; echo x > /look/y; cd /data; cat /kept; sync")
    assert output.out == "text\n", output
    assert "not connected" in output.err or "abort" in output.err, output
