"""Hostile attempts, each made twice: on the host, where it works (the control: the attempt is real), and in a box,
where it must not.

The attempts are subcommands of `probe.c`. A control that changes nothing on the host is part of each.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.core import agentproto
from hutch.engine.base import Lower
from hutch.engine.container import ContainerEngine
from hutch.engine.launcher import sealed_agent
from hutch.host.binary import agent_path
from hutch.types import Limits
from tests.engine import boxes
from tests.escape.conftest import in_box, on_host

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def box(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[boxes.Box]:
    """One box in which the attempts are made."""
    engine = ContainerEngine()
    plan = boxes.plan(tmp_path_factory.mktemp("boxes") / "box", image, limits=Limits(pids=200, memory_mib=256))
    started = anyio.run(engine.start, plan)
    try:
        yield boxes.Box(plan.directory, plan, started, engine)
        assert engine.observe(plan.directory).running, "an attempt ended the box"
    finally:
        anyio.run(engine.kill, plan.directory)


# fmt: off
CALLS = (
    "mount", "fsopen", "open_tree", "remount", "umount", "pivot_root", "cgroup_mount", "unshare_mount",
    "unshare_user", "setns", "clone_user", "clone3_user", "handle", "add_key", "keyctl", "bpf", "userfaultfd",
    "perf", "io_uring", "fanotify", "kexec", "init_module", "finit_module", "reboot", "swapon", "acct", "quotactl",
    "clock", "syslog", "ioperm", "hostname", "personality", "capset", "nice", "realtime", "tiocsti", "tiocsti_high",
    "line_discipline", "packet_socket", "packet_socket_of_ipv4", "vsock", "alg", "netlink_generic", "netlink_uevent",
    "mknod", "x32", "core_limit",
)
# fmt: on


@pytest.mark.parametrize("attempt", CALLS)
def test_system_call(box: boxes.Box, image: Path, attempt: str) -> None:
    control = on_host(image, attempt)
    inside = in_box(box, attempt)
    assert inside.status == 1, inside
    if control.status != 0 and control.out == inside.out:
        pytest.skip(f"this kernel does not have it at all: {control.out.strip()}")
    assert control.status == 0 or "not implemented" in control.out, control


def test_types_of_sockets_load_no_modules(box: boxes.Box) -> None:
    """The refusal is the filter's: the kernel, which would look for a module, has other words."""
    assert "Protocol not supported" in in_box(box, "dccp").out


def test_32_bit_calls_end_the_process(box: boxes.Box, image: Path) -> None:
    if on_host(image, "int80").status != 0:
        pytest.skip("this kernel has no 32-bit calls")
    assert in_box(box, "int80").status == -31  # SIGSYS


# fmt: off
PROCESS = (
    "ptrace", "proc_mem", "proc_maps", "proc_environ", "proc_root", "proc_cwd", "proc_exe", "proc_fd", "proc_ns",
    "vm_read", "pidfd_getfd",
)
# fmt: on


@pytest.mark.parametrize("attempt", PROCESS)
def test_pid_1_is_out_of_reach(box: boxes.Box, image: Path, bystander: subprocess.Popen[bytes], attempt: str) -> None:
    assert on_host(image, attempt, str(bystander.pid)).status == 0
    inside = in_box(box, attempt, "1")
    assert inside.status == 1 and "refused" in inside.out, inside


def test_pid_1_does_not_die(box: boxes.Box) -> None:
    for number in ("KILL", "TERM", "STOP", "SEGV", "ABRT"):
        anyio.run(box.sh, f"kill -{number} 1")
    assert anyio.run(box.sh, "echo alive").out == "alive\n"


def test_host_processes_cannot_be_signalled(box: boxes.Box, image: Path, bystander: subprocess.Popen[bytes]) -> None:
    assert on_host(image, "signal", str(bystander.pid)).status == 0
    assert in_box(box, "signal", str(bystander.pid)).status == 1
    listing = anyio.run(box.sh, "ls -d /proc/[0-9]*").out.split()
    assert len(listing) < 10


@pytest.mark.parametrize(
    ("attempt", "path"),
    [
        ("write", "/proc/sys/kernel/core_pattern"),
        ("write", "/proc/sys/vm/drop_caches"),
        ("write", "/proc/sys/net/ipv4/ip_forward"),
        ("write", "/proc/sysrq-trigger"),
        ("write", "/sys/kernel/mm/transparent_hugepage/enabled"),
        ("write", "/sys/power/state"),
        ("content", "/proc/timer_list"),
        ("content", "/proc/keys"),
        ("read", "/proc/kmsg"),
        ("read", "/dev/kmsg"),
        ("read", "/dev/loop-control"),
        ("read", "/dev/mem"),
        ("read", "/dev/vda"),
        ("read", "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        ("read", "/sys/kernel/debug/sched"),
    ],
)
def test_files_of_the_kernel(box: boxes.Box, image: Path, attempt: str, path: str) -> None:
    if on_host(image, attempt, path).status != 0:
        pytest.skip("not here on the host either")
    inside = in_box(box, attempt, path)
    if path == "/proc/kmsg":  # masked by /dev/null: opens, and is empty
        inside = in_box(box, "content", path)
    assert inside.status == 1, inside


def test_kernel_files_are_masked_and_read_only(box: boxes.Box) -> None:
    """Also where ownership in the user namespace would refuse already."""
    points: dict[str, list[str]] = {}
    for line in anyio.run(box.sh, "cat /proc/self/mountinfo").out.splitlines():
        left, _, right = line.partition(" - ")
        points.setdefault(left.split()[4], []).extend([*left.split()[5].split(","), right.split()[0]])
    for path in ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"):
        if Path(path).exists():
            assert {"ro", "nosuid", "nodev", "noexec", "proc"} <= set(points[path])
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(points["/sys"])
    for path in ("acpi", "interrupts", "kcore", "keys", "kmsg", "latency_stats", "sched_debug", "scsi", "timer_list"):
        if Path(f"/proc/{path}").exists():
            assert "proc" not in points[f"/proc/{path}"]
    for path in ("/sys/firmware", "/sys/devices/virtual/powercap", "/sys/fs/cgroup"):
        if Path(path).exists():
            assert {"ro", "tmpfs"} <= set(points[path])
    assert "nodev" in points["/"]


def test_kernel_settings_stay_read_only_for_paths_through_a_process(box: boxes.Box, image: Path) -> None:
    assert in_box(box, "write", "/proc/self/root/proc/sys/kernel/core_pattern").status == 1
    assert in_box(box, "write", "/proc/thread-self/root/proc/sysrq-trigger").status == 1


def test_set_user_id_gives_nothing(box: boxes.Box, image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "probe"
    copy.write_bytes((image / "bin/probe").read_bytes())
    copy.chmod(0o4755)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    control = subprocess.run(["setpriv", "--reuid", "65534", "--clear-groups", copy, "effective_root"])
    assert control.returncode == 0
    anyio.run(box.sh, "cp /bin/probe /tmp/setuid && chmod 4755 /tmp/setuid")

    async def inside() -> boxes.Output:
        return await box.run("/tmp/setuid", "effective_root", user="user")

    assert anyio.run(inside).status == 1


def test_device_nodes_of_an_image_are_dead(image: Path, tmp_path: Path) -> None:
    """A layer may hold the node of any device; the root is mounted without devices."""
    layer = tmp_path / "layer"
    layer.mkdir()
    os.mknod(layer / "zero", 0o020666, os.makedev(1, 5))
    (layer / "zero").chmod(0o666)
    assert on_host(image, "content", str(layer / "zero")).status == 0

    async def main() -> None:
        engine = ContainerEngine()
        async with boxes.running(engine, boxes.plan(tmp_path / "box", image, lowers=[Lower(layer)])) as box:
            output = await box.run("probe", "read", "/zero")
            assert output.status == 1 and "Permission denied" in output.out, output

    anyio.run(main)


def test_host_network_and_sockets(box: boxes.Box, image: Path) -> None:
    """Neither the loopback interface, nor abstract sockets, nor the paths of sockets are shared."""
    name = f"hutch-escape-{os.getpid()}"
    with (
        socket.socket(socket.AF_UNIX) as abstract,
        socket.socket(socket.AF_INET) as loopback,
        socket.socket(socket.AF_UNIX) as path,
    ):
        abstract.bind(f"\0{name}")
        abstract.listen()
        loopback.bind(("127.0.0.1", 0))
        loopback.listen()
        path.bind(f"/tmp/{name}")
        path.listen()
        try:
            for attempt, where in (
                ("abstract", name),
                ("loopback", str(loopback.getsockname()[1])),
                ("unix", f"/tmp/{name}"),
            ):
                assert on_host(image, attempt, where).status == 0, attempt
                assert in_box(box, attempt, where).status == 1, attempt
        finally:
            Path(f"/tmp/{name}").unlink()
    assert anyio.run(box.sh, "ls /sys/class/net").out == "lo\n"


def test_the_agent_socket_is_out_of_reach(box: boxes.Box, image: Path) -> None:
    """The agent obeys whoever connects, so its socket must not be nameable in the box."""
    real = str(box.directory / "run/agent.sock")
    if len(real) < 108:
        assert on_host(image, "unix", real).status == 0
        assert in_box(box, "unix", real).status == 1
    assert "agent.sock" not in anyio.run(box.sh, "cat /proc/net/unix").out
    assert in_box(box, "unix", "/proc/1/fd/3").status == 1
    assert in_box(box, "unix", "/proc/1/cwd/run/agent.sock").status == 1


def test_shared_memory_segments(box: boxes.Box, image: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    key = 0x68000000 + os.getpid()
    segment = libc.shmget(key, 4096, 0o1666)
    assert segment >= 0
    try:
        assert on_host(image, "shared_segment", str(key)).status == 0
        assert in_box(box, "shared_segment", str(key)).status == 1
    finally:
        libc.shmctl(segment, 0, None)


def test_chroot_leads_nowhere(box: boxes.Box, image: Path, tmp_path: Path) -> None:
    """Climbing out of a chroot works as anywhere, up to the box's own root."""
    marker = tmp_path / "marker"
    marker.touch()
    try:
        assert on_host(image, "chroot", str(marker)).status == 0
    finally:
        for cell in Path("/tmp").glob("probe-cell-*"):
            cell.rmdir()
    inside = in_box(box, "chroot", str(marker))
    assert inside.status == 1 and "No such file" in inside.out, inside


def test_the_agent_program_cannot_be_overwritten(box: boxes.Box, image: Path, tmp_path: Path) -> None:
    """A command line of /proc/self/exe makes the agent's child run the host's program; a second process goes for its
    file."""
    copy = tmp_path / "sleep"
    copy.write_bytes((image / "bin/busybox").read_bytes())
    copy.chmod(0o755)
    with subprocess.Popen([copy, "600"]) as process:
        assert on_host(image, "overwrite", str(process.pid)).status == 0
        process.wait()
    assert copy.read_bytes()[0:1] == b"x"

    program = sealed_agent(agent_path())
    before = os.pread(program, 1 << 24, 0)

    async def attack() -> boxes.Output:
        with await box.engine.connect(box.directory) as connection:
            connection.settimeout(10)
            argv = ["/proc/self/exe", "unpack", "--dest", "/tmp"]
            connection.sendall(agentproto.start("overwritten", argv, req=1, env={}, stdin=True))
            answer = agentproto.decode_answer(next(boxes.received(connection)))
            assert isinstance(answer, agentproto.Started), answer
            for _ in range(100):
                if "box-agent" in (await box.run("readlink", f"/proc/{answer.pid}/exe")).out:
                    break
                await anyio.sleep(0.01)
            else:
                raise AssertionError("the agent's program does not run in the box")
            return await box.run("probe", "overwrite", str(answer.pid))

    output = anyio.run(attack)
    assert output.status == 1 and "refused" in output.out, output
    assert os.pread(program, 1 << 24, 0) == before
    assert agent_path().read_bytes().startswith(b"\x7fELF")
    with pytest.raises(PermissionError):
        os.pwrite(program, b"x", 0)


def test_fork_bomb(image: Path, tmp_path: Path) -> None:
    assert on_host(image, "processes", "80").status == 0
    limit = 40

    async def main() -> None:
        engine = ContainerEngine()
        plan = boxes.plan(tmp_path / "box", image, limits=Limits(pids=limit, cpus=1))
        async with boxes.running(engine, plan) as box:
            output = await box.run("probe", "processes", "80")
            assert output.status == 1 and int(output.out) < limit
            await box.spawn("bomb() { bomb | bomb & }; while :; do bomb; done")
            await anyio.sleep(0.2)
            pids = engine.usage(box.directory).pids
            assert pids is not None and pids <= limit
            begun = time.monotonic()
            await engine.kill(box.directory)
            assert time.monotonic() - begun < 5

    anyio.run(main)


def test_descriptors_run_out_for_the_box_alone(box: boxes.Box, image: Path) -> None:
    assert on_host(image, "descriptors", "100").status == 0
    assert anyio.run(box.sh, "ulimit -n 500; probe descriptors 1000").status == 1
    assert in_box(box, "descriptors", "2000000").status == 1
    with Path("/dev/null").open():
        pass


def test_files_in_memory_run_out(box: boxes.Box, image: Path) -> None:
    """Kernel memory for names is bounded where no disk bounds it."""
    assert on_host(image, "inodes", "3000").status == 0
    output = in_box(box, "inodes", "3000")
    assert output.status == 1 and int(output.out) < 1024
    output = anyio.run(box.sh, "dd if=/dev/zero of=/dev/shm/big bs=1M count=100; ls -l /dev/shm/big | awk '{print $5}'")
    assert int(output.out) <= 64 << 20
    output = anyio.run(box.sh, "head -c 3000000 /dev/zero > /etc/hosts; stat -c %s /etc/hosts")
    assert int(output.out) <= 1 << 20
    anyio.run(box.sh, "rm -f /dev/shm/big /dev/probe-*; : > /etc/hosts")


NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


def test_privileges_of_a_command(box: boxes.Box) -> None:
    status = anyio.run(box.sh, "cat /proc/self/status").out
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    assert int(fields["CapBnd"], 16) == int(fields["CapEff"], 16) == 0x00000000A80425FB
    assert int(fields["CapAmb"], 16) == int(fields["CapInh"], 16) == 0
    namespaces = anyio.run(
        box.sh, "cd /proc/self/ns && for n in cgroup ipc mnt net pid time user uts; do readlink $n; done"
    ).out
    ours = [str(Path(f"/proc/self/ns/{name}").readlink()) for name in NAMESPACES]
    assert len(namespaces.split()) == 8 and not set(namespaces.split()) & set(ours)
