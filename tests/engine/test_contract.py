"""What every engine promises (hutch.engine.base), shown on real boxes.

The suite runs as whoever starts it; `test_rootless.py` runs it once more as an ordinary user.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import msgspec
import pytest

from hutch.core import agentproto
from hutch.engine.base import Capability, Lower, MountPlan, Observed, Upper, Usage
from hutch.errors import EngineError, InvalidArgumentError, InvalidStateError, StorageError, UpstreamUnavailableError
from hutch.host import mapping, proc
from tests.engine.boxes import ENVIRONMENT, plan, received, running

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hutch.engine.base import Engine
    from hutch.engine.container import ContainerEngine

pytestmark = pytest.mark.anyio

ALL_IDS = mapping.current().count >= 65_536


async def test_a_started_box_answers(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    async with running(engine, plan(tmp_path / "box", rootfs)) as box:
        assert engine.observe(box.directory) == Observed(running=True, pid=box.started.pid)
        output = await box.sh("id -u; hostname; cat /etc/release; echo oops >&2; exit 7")
        assert output.status == 7
        assert output.out == "0\ntestbox\nhutch test image\n"
        assert output.err == "oops\n"


async def test_kill_leaves_nothing(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    async with running(engine, plan(tmp_path / "box", rootfs)) as box:
        await box.spawn("sleep 1000 & sleep 1000")
        pid = box.started.pid
        await engine.kill(box.directory)
        assert not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
        assert engine.observe(box.directory) == Observed(running=False)
        assert engine.usage(box.directory) == Usage()
        assert not any((box.directory / "run").iterdir())
        with pytest.raises(UpstreamUnavailableError):
            await engine.connect(box.directory)
        await engine.kill(box.directory)


async def test_files_survive_stop_and_start(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    box_plan = plan(tmp_path / "box", rootfs)
    async with running(engine, box_plan) as box:
        await box.sh("echo kept > /root/file; rm /etc/release; mkdir /new")
    async with running(engine, box_plan) as box:
        output = await box.sh("cat /root/file; test ! -e /etc/release && test -d /new && echo yes")
        assert output.out == "kept\nyes\n"
    assert (rootfs / "etc/release").exists()


async def test_a_missing_box_is_not_running(engine: Engine, tmp_path: Path) -> None:
    assert engine.observe(tmp_path / "none") == Observed(running=False)
    assert engine.usage(tmp_path / "none") == Usage()
    await engine.kill(tmp_path)
    with pytest.raises(UpstreamUnavailableError):
        await engine.connect(tmp_path / "none")


async def test_the_end_of_pid_1_is_the_end_of_the_box(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    async with running(engine, plan(tmp_path / "box", rootfs)) as box:
        await box.spawn("sleep 1000")
        os.kill(box.started.pid, 9)
        assert await proc.poll_until(lambda: not engine.observe(box.directory).running, 5)


async def test_namespaces_are_open_to_the_host(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    """The box's network is set up from outside, by its own user."""
    async with running(container, plan(tmp_path / "box", rootfs)) as box:
        for name in ("net", "user", "mnt"):
            os.close(os.open(f"/proc/{box.started.pid}/ns/{name}", os.O_RDONLY))


async def test_a_running_box_is_not_started_again(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    async with running(engine, plan(tmp_path / "box", rootfs)) as box:
        with pytest.raises(InvalidStateError):
            await engine.start(box.plan)
        assert (await box.sh("echo untouched")).out == "untouched\n"


async def test_a_box_that_ended_by_itself_starts_again(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    async with running(engine, plan(tmp_path / "box", rootfs)) as box:
        os.kill(box.started.pid, 9)
        assert await proc.poll_until(lambda: not engine.observe(box.directory).running, 5)
        await engine.start(box.plan)
        assert (await box.sh("echo again")).out == "again\n"


async def test_a_stale_record_is_not_believed(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    """The pid of a dead box may belong to anybody: with another start time, or of another boot, it is not ours."""
    async with running(engine, plan(tmp_path / "box", rootfs)) as box:
        path = box.directory / "run/state.json"
        real = path.read_bytes()
        record = msgspec.json.decode(real)
        for change in ({"started": 1}, {"boot": "of another day"}):
            path.write_bytes(msgspec.json.encode({**record, "process": {**record["process"], **change}}))
            assert not engine.observe(box.directory).running
        path.write_bytes(b"{ half a rec")
        assert not engine.observe(box.directory).running
        path.write_bytes(real)


async def test_a_deep_folder_is_no_obstacle(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    """A unix socket's address holds 108 bytes; a box's folder may be longer."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    async with running(engine, plan(deep / "box", rootfs)) as box:
        assert (await box.sh("echo deep")).out == "deep\n"


async def test_names_with_special_characters(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a b,c:d\\e=é"
    odd.mkdir()
    (odd / "layer,1:2").mkdir()
    (odd / "layer,1:2" / "found").write_text("odd\n")
    async with running(engine, plan(odd / "box", rootfs, lowers=[Lower(odd / "layer,1:2")])) as box:
        assert (await box.sh("cat /found")).out == "odd\n"


async def test_layers_and_a_frozen_upper(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    """What one box wrote is a layer for the next: changes, deletions, and owners."""
    first = plan(tmp_path / "first", rootfs)
    async with running(engine, first) as box:
        chown = "chown 1000:50 /owned" if ALL_IDS else "true"
        assert (await box.sh(f"echo one > /owned; {chown}; rm /etc/release; rm -r /home; mkdir /home")).status == 0
    await engine.move_upper(first.directory, tmp_path / "frozen")
    frozen = Lower(tmp_path / "frozen", owned_by_box=True)
    async with running(engine, plan(tmp_path / "second", rootfs, lowers=[frozen])) as box:
        output = await box.sh("stat -c '%u:%g' /owned; ls /home; test -e /etc/release || echo gone; echo x >> /owned")
        assert output.out == ("1000:50\ngone\n" if ALL_IDS else "0:0\ngone\n")
        assert output.status == 0
    async with running(engine, plan(tmp_path / "third", rootfs, lowers=[frozen])) as box:
        assert (await box.sh("cat /owned")).out == "one\n"


async def test_many_layers(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    layers = []
    for number in range(120):
        layer = tmp_path / "layers" / f"{number:0100}"
        layer.mkdir(parents=True)
        (layer / "top").write_text(f"{number}\n")
        (layer / f"only{number}").touch()
        layers.append(Lower(layer))
    async with running(engine, plan(tmp_path / "box", rootfs, lowers=layers)) as box:
        assert (await box.sh("cat /top; ls -d /only* | wc -l")).out == "0\n120\n"


async def test_files_of_the_host(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    async with running(engine, plan(tmp_path / "box", rootfs)) as box:
        output = await box.sh(
            "cat /etc/hostname; grep -c testbox /etc/hosts; echo 'nameserver 9.9.9.9' > /etc/resolv.conf"
        )
        assert output.status == 0, output
        assert output.out == "testbox1\n"
        assert "127.0.0.1" in (await box.sh("ifconfig lo")).out
    assert not (rootfs / "etc/hosts").exists()


async def test_etc_links_stay_inside(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    """An image may make /etc/hosts, or the target of a mount, a symlink to anywhere: it is anywhere in the box."""
    victim = tmp_path / "victim"
    victim.write_text("host\n")
    layer = tmp_path / "layer"
    (layer / "etc").mkdir(parents=True)
    (layer / "etc/hosts").symlink_to(victim)
    (layer / "etc/resolv.conf").symlink_to("../../../../../../../../../../run/resolv.conf")
    (layer / "etc/hostname").mkdir()
    (layer / "run").mkdir()
    (layer / "link").symlink_to(f"{tmp_path}")
    source = tmp_path / "source"
    source.mkdir()
    mounts = [MountPlan(source, "/link/made/here")]
    box_plan = plan(tmp_path / "box", rootfs, lowers=[Lower(layer)], mounts=mounts)
    (layer / str(tmp_path)[1:]).mkdir(parents=True)
    async with running(engine, box_plan) as box:
        output = await box.sh(f"touch {tmp_path}/made/here/file; cat /run/resolv.conf && echo linked")
        assert output.out == "linked\n", output
    assert victim.read_text() == "host\n"
    assert (source / "file").exists()
    assert not (tmp_path / "made").exists()


async def test_a_base_folder_that_is_a_link(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "layer").mkdir()
    (tmp_path / "layer/proc").symlink_to("/etc")
    with pytest.raises(EngineError, match="proc"):
        async with running(engine, plan(tmp_path / "box", rootfs, lowers=[Lower(tmp_path / "layer")])):
            pass


async def test_mounts(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "rw").mkdir()
    (tmp_path / "ro").mkdir()
    (tmp_path / "ro/inside").write_text("read me\n")
    (tmp_path / "file").write_text("single\n")
    mounts = [
        MountPlan(tmp_path / "rw", "/data"),
        MountPlan(tmp_path / "ro", "/deep/er/ro", read_only=True),
        MountPlan(tmp_path / "file", "/etc/app/file", read_only=True),
    ]
    async with running(engine, plan(tmp_path / "box", rootfs, mounts=mounts)) as box:
        output = await box.sh("cat /deep/er/ro/inside /etc/app/file; echo new > /data/file; stat -c %u /data/file")
        assert output.out == "read me\nsingle\n0\n"
        assert (tmp_path / "rw/file").read_text() == "new\n"
        assert (tmp_path / "rw/file").stat().st_uid == os.geteuid()
        output = await box.sh("grep -E ' /(data|deep/er/ro) ' /proc/mounts")
        assert len(output.out.splitlines()) == 2
        for line in output.out.splitlines():
            assert {"nosuid", "nodev"} <= set(line.split()[3].split(","))
        if engine.name == "vm":  # the mounts inside are its own; what they show is not
            output = await box.sh("for m in /deep/er/ro /etc/app/file; do mount -o remount,rw,bind $m || exit; done")
            assert output.status == 0, output
        else:
            assert (await box.sh("mount -o remount,rw,bind /deep/er/ro || umount /deep/er/ro")).status != 0
        for attempt in (
            "echo x > /deep/er/ro/inside",
            "touch /deep/er/ro/new",
            "mkdir /deep/er/ro/new",
            "ln /deep/er/ro/inside /deep/er/ro/new",
            "mv /deep/er/ro/inside /deep/er/ro/new",
            "rm /deep/er/ro/inside",
            "chmod 777 /deep/er/ro/inside",
            "chown 5 /deep/er/ro/inside",
            "truncate -s 0 /deep/er/ro/inside",
            "echo x > /etc/app/file",
        ):
            assert (await box.sh(attempt)).status != 0, attempt
    assert (tmp_path / "ro/inside").read_text() == "read me\n"
    assert [path.name for path in (tmp_path / "ro").iterdir()] == ["inside"]
    assert (tmp_path / "file").read_text() == "single\n"


@pytest.mark.parametrize("target", ["data", "/", "/a/../b", "/..", ""])
async def test_malformed_targets(engine: Engine, rootfs: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(InvalidArgumentError):
        await engine.start(plan(tmp_path / "box", rootfs, mounts=[MountPlan(tmp_path, target)]))


@pytest.mark.skipif(not ALL_IDS, reason="boxes have one id here")
async def test_owners_in_the_box(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(container, plan(tmp_path / "box", rootfs)) as box:
        assert (await box.sh("id -u; id -g; id -G", user="user")).out == "1000\n1000\n1000 50\n"
        assert (await box.sh("touch /etc/x 2>&1 || echo no", user="user")).out.endswith("no\n")
        assert (await box.sh("chown 1234:4321 /tmp; stat -c %u:%g /tmp /bin/sh /")).out == "1234:4321\n0:0\n0:0\n"
    owner = (tmp_path / "box/upper/tmp").stat()
    host_ids = range(201_234, 201_235) if os.geteuid() == 0 else range(100_000, 1 << 32)
    assert owner.st_uid in host_ids
    assert stat.S_IMODE(owner.st_mode) == 0o1777


async def test_devices(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(container, plan(tmp_path / "box", rootfs)) as box:
        output = await box.sh(
            "echo x > /dev/null && head -c 4 /dev/zero | od -An -tx1 && head -c 8 /dev/urandom | wc -c;"
            "echo y > /dev/stdout; echo z > /dev/shm/z && cat /dev/shm/z; ls /dev/pts/ptmx; ls /dev | tr '\\n' ' '"
        )
        assert output.out == (
            " 00 00 00 00\n8\ny\nz\n/dev/pts/ptmx\n"
            "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero "
        )


async def test_freeze_and_thaw(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    if Capability.PAUSE not in container.capabilities:
        pytest.skip("no freezer here")
    async with running(container, plan(tmp_path / "box", rootfs)) as box:
        await box.spawn("while true; do date +%N > /tmp/clock; done")
        await container.freeze(box.directory)
        await container.freeze(box.directory)
        assert container.observe(box.directory).running
        clock = tmp_path / "box/upper/tmp/clock"
        before = clock.stat().st_mtime_ns if clock.exists() else 0
        await anyio.sleep(0.1)
        assert (clock.stat().st_mtime_ns if clock.exists() else 0) == before
        await container.thaw(box.directory)
        await container.thaw(box.directory)
        assert (await box.sh("echo awake")).out == "awake\n"
        await container.freeze(box.directory)  # a frozen box can be killed


async def test_start_failure_leaves_nothing(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    box_plan = plan(tmp_path / "box", rootfs, mounts=[MountPlan(tmp_path / "missing", "/data")])
    with pytest.raises(EngineError, match=r"missing: No such file or directory"):
        await engine.start(box_plan)
    assert not any((box_plan.directory / "run").iterdir())
    assert not engine.observe(box_plan.directory).running
    assert not list(Path("/sys/fs/cgroup").glob(f"*/hutch/{box_plan.box_id}"))


async def test_start_failure_inside_names_the_step(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    mounts = [MountPlan(tmp_path / "file", "/etc/release/x")]
    with pytest.raises(EngineError, match=r"mounting in the box at /etc/release/x: Not a directory"):
        await engine.start(plan(tmp_path / "box", rootfs, mounts=mounts))


async def test_cancelled_starts_leave_nothing(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    """Cut at many moments: each start either gave a running box, or nothing is left of it."""
    cancelled = 0
    await engine.start(whole := plan(tmp_path / "whole", rootfs))  # what is made once is there now
    await engine.kill(whole.directory)
    steps, pause = (12, 0.06) if engine.name == "vm" else (25, 0.0005)
    for step in range(steps):
        box_plan = plan(tmp_path / f"box{step}", rootfs)
        started = False
        with anyio.move_on_after(step * pause):
            await engine.start(box_plan)
            started = True
        assert engine.observe(box_plan.directory).running == started
        if not started:
            cancelled += 1
            run = box_plan.directory / "run"
            assert not run.exists() or not any(run.iterdir())
            assert not list(Path("/sys/fs/cgroup").glob(f"*/hutch/{box_plan.box_id}"))
        await engine.kill(box_plan.directory)
    assert cancelled


async def test_connect_is_non_blocking(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    async with running(engine, plan(tmp_path / "box", rootfs)) as box:
        with await engine.connect(box.directory) as connection:
            assert connection.family == socket.AF_UNIX
            assert connection.getblocking() is False


async def test_much_that_is_ready_at_once_is_said_unasked(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    """More of it than the agent sends in one turn, and then nothing happens that would give it another."""
    names = [f"much{number}" for number in range(100)]

    def ends(connection: socket.socket) -> None:
        connection.setblocking(True)
        connection.settimeout(5)
        connection.sendall(b"".join(agentproto.attach(name, {1: 0, 2: 0}, req=0) for name in names))
        waiting = {(name, stream) for name in names for stream in (1, 2)}
        for frame in received(connection):
            if agentproto.decode_answer(frame) is None:
                event = agentproto.decode_event(frame)
                if isinstance(event, agentproto.Eof):
                    waiting.remove((frame.exec_id, event.stream))
                    if not waiting:
                        return
        raise AssertionError("the agent closed the connection")

    async with running(engine, plan(tmp_path / "box", rootfs)) as box:
        await anyio.to_thread.run_sync(_run_all, await engine.connect(box.directory), names)
        with await engine.connect(box.directory) as connection:
            await anyio.to_thread.run_sync(ends, connection)


def _run_all(connection: socket.socket, names: Sequence[str]) -> None:
    """Run a command under each id, to its end; its output is kept."""
    with connection:
        connection.setblocking(True)
        connection.settimeout(10)
        for number, name in enumerate(names, 1):
            connection.sendall(agentproto.start(name, ["echo", name], req=number, env=ENVIRONMENT))
        ended = 0
        for frame in received(connection):
            if (answer := agentproto.decode_answer(frame)) is not None:
                assert isinstance(answer, agentproto.Started), answer
            elif isinstance(agentproto.decode_event(frame), agentproto.Exited):
                ended += 1
                if ended == len(names):
                    return
    raise AssertionError("the agent closed the connection")


async def test_several_boxes_at_once(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    plans = [plan(tmp_path / f"box{number}", rootfs) for number in range(8)]
    async with anyio.create_task_group() as tasks:
        for box_plan in plans:
            tasks.start_soon(engine.start, box_plan)
    try:
        pids = {engine.observe(box_plan.directory).pid for box_plan in plans}
        assert len(pids) == 8 and None not in pids
    finally:
        for box_plan in plans:
            await engine.kill(box_plan.directory)


async def test_copy_and_remove_trees(container: ContainerEngine, rootfs: Path, tmp_path: Path) -> None:
    async with running(container, plan(tmp_path / "box", rootfs)) as box:
        chown = "chown 1000:50 a" if ALL_IDS else "true"
        script = (
            f"cd /root && echo data > a && ln a b && ln -s /etc/passwd link && {chown} && chmod 4711 a && "
            "mkfifo fifo && mkdir -m 0 closed && rm /etc/release && "
            "dd if=/dev/zero of=sparse bs=1 count=1 seek=10M 2>/dev/null"
        )
        assert (await box.sh(script)).status == 0
    copy = tmp_path / "copy"
    await container.copy_tree(tmp_path / "box/upper", copy)
    with pytest.raises(StorageError):
        await container.copy_tree(tmp_path / "box/upper", copy)
    frozen = Lower(copy, owned_by_box=True)
    async with running(container, plan(tmp_path / "second", rootfs, lowers=[frozen])) as box:
        output = await box.sh(
            "cd /root; stat -c '%a %u:%g %h' a; readlink link; test -p fifo && echo fifo; stat -c %a closed;"
            "test $(du -k sparse | cut -f1) -lt 100 && echo sparse; test -e /etc/release || echo gone"
        )
        owner = "1000:50" if ALL_IDS else "0:0"
        assert output.out == f"4711 {owner} 2\n/etc/passwd\nfifo\n0\nsparse\ngone\n"
    for path in (copy, tmp_path / "box", tmp_path / "second"):
        await container.remove_tree(path)
        assert not path.exists()
        await container.remove_tree(path)


async def test_remove_tree_does_not_follow_links(container: ContainerEngine, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/link").symlink_to(tmp_path / "kept")
    (tmp_path / "top").symlink_to(tmp_path / "kept")
    await container.remove_tree(tmp_path / "tree")
    await container.remove_tree(tmp_path / "top")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept/file").exists()


async def test_a_failed_copy_leaves_nothing(container: ContainerEngine, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        await container.copy_tree(tmp_path / "absent", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


async def test_the_writable_layer(engine: Engine, rootfs: Path, tmp_path: Path) -> None:
    """It can be measured, moved away to be a layer of other boxes, copied and emptied, whoever in the box owns it."""
    box_plan = plan(tmp_path / "box", rootfs)
    assert engine.upper(box_plan.directory) is Upper.EMPTY
    await engine.reset_upper(box_plan.directory)
    async with running(engine, box_plan) as box:
        close = "chown 1000:50 / && chmod 711 /" if ALL_IDS else "true"
        await box.sh(f"dd if=/dev/urandom of=/data bs=1k count=100 conv=fsync; {close}")
        assert 100 << 10 <= await engine.upper_size(box.directory) < 16 << 20
    assert engine.upper(box_plan.directory) is Upper.MOVABLE
    await engine.copy_upper(box_plan.directory, tmp_path / "copied")
    await engine.move_upper(box_plan.directory, tmp_path / "moved")
    assert engine.upper(box_plan.directory) is Upper.EMPTY
    assert await engine.upper_size(box_plan.directory) == 0
    copied, moved = [await engine.tree_size(tmp_path / name) for name in ("copied", "moved")]
    assert min(copied, moved) > 100 << 10
    assert copied == moved or engine.name == "vm"  # a copy has holes where zeros were written
    assert await engine.tree_size(tmp_path / "absent") == 0
    for name in ("copied", "moved"):
        async with running(engine, plan(tmp_path / name[0], rootfs, lowers=[Lower(tmp_path / name, True)])) as box:
            assert (await box.sh("wc -c < /data")).out == "102400\n"
    async with running(engine, box_plan) as box:
        assert (await box.sh("test -e /data || echo gone; echo x > /x")).out == "gone\n"
    for _ in range(2):
        await engine.reset_upper(box_plan.directory)
        assert engine.upper(box_plan.directory) is Upper.EMPTY
    with pytest.raises(StorageError):
        await engine.move_upper(box_plan.directory, tmp_path / "moved")


async def test_a_very_deep_tree_is_removed(container: ContainerEngine, tmp_path: Path) -> None:
    """Deeper than a stack or a path can be: a box makes such trees with relative steps."""
    script = "import os, sys; os.chdir(sys.argv[1])\nfor _ in range(5000): os.mkdir('d'); os.chdir('d')"
    tree = tmp_path / "tree"
    tree.mkdir()
    await anyio.run_process([sys.executable, "-c", script, str(tree)])
    assert await container.tree_size(tree) >= 0
    await container.remove_tree(tree)
    assert list(tmp_path.iterdir()) == []
