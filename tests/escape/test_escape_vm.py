"""Hostile attempts in a box that is a VM: by the root of the guest, who may do to the guest what he likes, and by an
emulator that he has taken over, which makes the system calls that `inject.c` puts into it.

Each attempt is made on the host as well, where it works: the control.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import subprocess
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import pytest

from hutch.engine import record
from hutch.engine.vm import VmEngine, disk
from hutch.host.proc import poll_until
from hutch.types import Limits
from tests.engine import boxes
from tests.escape.conftest import in_box, on_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.root

# Numbers of system calls (x86-64).
SOCKET, CONNECT, FCNTL, PWRITE, OPEN, KILL, PTRACE, SHMGET = 41, 42, 72, 18, 2, 62, 101, 29
MMAP, FTRUNCATE = 9, 77
KEYCTL, PERF_EVENT_OPEN, BPF, USERFAULTFD, IO_URING_SETUP = 250, 298, 321, 323, 425
EXECVE, SETUID, UNSHARE, MOUNT, SETPRIORITY = 59, 105, 272, 165, 141
EPERM, ENOENT, ESRCH, EBADF, EINVAL, EFBIG, ENOSYS, ECONNREFUSED = 1, 2, 3, 9, 22, 27, 38, 111
PTRACE_ATTACH, F_GETFL = 16, 3


@pytest.fixture(scope="module")
def pair(
    image: Path, vm_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[boxes.Box, boxes.Box]]:
    """A box in which the attempts are made, and another one beside it."""
    vm = VmEngine(vm_store)
    folder = tmp_path_factory.mktemp("boxes")
    pair = []
    for name in ("box", "other"):
        plan = boxes.plan(folder / name, image, limits=Limits(pids=200, memory_mib=256))
        pair.append(boxes.Box(plan.directory, plan, anyio.run(vm.start, plan), vm))
    try:
        yield pair[0], pair[1]
        for box in pair:
            assert vm.observe(box.directory).running, "an attempt ended a box"
            assert anyio.run(box.sh, "echo alive").out == "alive\n"
    finally:
        for box in pair:
            anyio.run(vm.kill, box.directory)


@pytest.fixture(scope="module")
def box(pair: tuple[boxes.Box, boxes.Box]) -> boxes.Box:
    return pair[0]


@pytest.fixture(scope="module")
def other(pair: tuple[boxes.Box, boxes.Box]) -> boxes.Box:
    return pair[1]


@pytest.fixture(scope="module")
def inject(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Lets a process make a system call, and returns what comes of it."""
    program = tmp_path_factory.mktemp("inject") / "inject"
    subprocess.run(["gcc", "-O1", "-o", program, Path(__file__).with_name("inject.c")], check=True)

    def call(pid: int, number: int, *arguments: object) -> str:
        words = [str(word) for word in (pid, number, *arguments)]
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call


def emulator(box: boxes.Box) -> int:
    return int(Path(f"/proc/{box.started.pid}/task/{box.started.pid}/children").read_text())


# The guest's root.


def test_the_kernel_is_another_one(box: boxes.Box, other: boxes.Box) -> None:
    """With its own processes, memory, devices; of the same kind in each box, and never the same one."""
    ours = Path("/proc/sys/kernel/random/boot_id").read_text()
    facts = [anyio.run(one.sh, "cat /etc/machine-id; uname -n -r").out for one in (box, other)]
    assert facts[0].splitlines()[0] != facts[1].splitlines()[0]
    assert os.uname().release not in facts[0]
    assert anyio.run(box.sh, "cat /proc/sys/kernel/random/boot_id").out != ours
    assert int(anyio.run(box.sh, "awk '/MemTotal/ {print $2}' /proc/meminfo").out) < 256 << 10
    assert anyio.run(box.sh, "ls /sys/class/net").out == "lo\n"
    assert anyio.run(box.sh, "ls /sys/block").out == "vda\n"
    commands = anyio.run(box.sh, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").out
    assert "qemu" not in commands and "python" not in commands


def test_nothing_of_the_host_is_mounted_or_named(box: boxes.Box, other: boxes.Box, vm_store: Path) -> None:
    """Among what the guest's root can read, and on the disk below his root."""
    sources = {line.split()[2] for line in anyio.run(box.sh, "cat /proc/mounts").out.splitlines()}
    assert not sources & {"9p", "virtiofs", "fuse", "fuseblk", "overlay"}
    seen = anyio.run(box.sh, "cat /proc/mounts /proc/cmdline /proc/1/environ /proc/net/unix; dmesg 2>&1").out
    for host in (box.directory, other.directory, vm_store):
        assert str(host) not in seen
    for path in (str(box.directory), str(vm_store), __file__):
        assert on_host(box.plan.lowers[-1].path, "read", path).status == 0
        assert in_box(box, "read", path).status == 1


def test_there_is_no_device_but_the_boxs_own(box: boxes.Box) -> None:
    """Its disk ends where it does, and nodes that its root makes for other devices lead nowhere."""
    script = """
        size=$(cat /sys/block/vda/size); echo $size
        dd if=/dev/vda bs=512 skip=$size count=1 2>/dev/null | wc -c
        dd if=/dev/vda bs=512 skip=$((size - 1)) count=1 2>/dev/null | wc -c
        for node in "b 254 0" "b 254 16" "b 8 0" "b 259 0" "c 10 232" "c 10 238" "c 10 241"; do
            mknod /tmp/node $node; probe read /tmp/node; rm /tmp/node
        done
    """
    size, beyond, last, *nodes = anyio.run(box.sh, script).out.splitlines()
    assert (int(size), beyond, last) == (10 << 21, "0", "512")
    assert len(nodes) == 6 and all("No such device" in node for node in nodes), nodes  # the first one is its disk


def test_sockets_segments_and_processes_of_the_host(
    box: boxes.Box, image: Path, bystander: subprocess.Popen[bytes]
) -> None:
    name = f"hutch-escape-vm-{os.getpid()}"
    libc = ctypes.CDLL(None, use_errno=True)
    key = 0x69000000 + os.getpid()
    segment = libc.shmget(key, 4096, 0o1666)
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket() as loopback:
        abstract.bind(f"\0{name}")
        abstract.listen()
        loopback.bind(("127.0.0.1", 0))
        loopback.listen()
        attempts = [
            ("abstract", name),
            ("loopback", str(loopback.getsockname()[1])),
            ("unix", str(box.directory / "run/agent.sock")),
            ("shared_segment", str(key)),
            ("signal", str(bystander.pid)),
        ]
        try:
            for attempt in attempts:
                if len(attempt[1]) < 108:
                    assert on_host(image, *attempt).status == 0, attempt
                    assert in_box(box, *attempt).status == 1, attempt
        finally:
            libc.shmctl(segment, 0, None)


# The emulator, once it has been taken over.


def test_a_taken_emulator_finds_no_file(
    box: boxes.Box, other: boxes.Box, vm_store: Path, bystander: subprocess.Popen[bytes], inject: Callable[..., str]
) -> None:
    """No path leads to another box, to what boxes share, to the host or to processes; nor to its own disk."""
    templates = list((vm_store / "templates").glob("*/memory"))
    paths = [*templates[:1], vm_store / "bases", other.directory / disk.DISK, other.directory / "run/agent.sock"]
    paths += [box.directory / disk.DISK, box.directory / "run/agent.sock", Path("/etc/passwd"), Path("/proc/self/maps")]
    paths += [Path("/dev/kmsg"), Path(f"/proc/{other.started.pid}/root"), Path("/sys/kernel"), Path("/bin/sh")]
    for path in paths:
        assert int(inject(bystander.pid, OPEN, f"@{path}", os.O_PATH)) >= 0, path
        assert int(inject(emulator(box), OPEN, f"@{path}", os.O_PATH)) == -ENOENT, path
    # What it does see it cannot write.
    for path in (Path("/lib/ld-linux.so.2"), vm_store.resolve(), Path("/usr/share/qemu"), Path("/")):
        assert int(inject(emulator(box), OPEN, f"@{path}/new", os.O_WRONLY | os.O_CREAT, 0o600)) < 0, path


def test_a_taken_emulator_cannot_write_the_template(
    box: boxes.Box, bystander: subprocess.Popen[bytes], inject: Callable[..., str], tmp_path: Path
) -> None:
    """The one open that is answered by its keeper gives a descriptor for reading."""
    (tmp_path / "memory").write_bytes(b"memory")
    control = inject(bystander.pid, OPEN, f"@{tmp_path / 'memory'}", os.O_RDWR)
    assert inject(bystander.pid, PWRITE, control, "@x", 1, 0) == "1"
    assert (tmp_path / "memory").read_bytes() == b"xemory"
    memory = inject(emulator(box), OPEN, "@/memory", os.O_RDWR)
    assert int(memory) < 0 or int(inject(emulator(box), PWRITE, memory, "@x", 1, 0)) == -EBADF
    for entry in Path(f"/proc/{emulator(box)}/fd").iterdir():
        if "/templates/" in str(entry.readlink()) or str(entry.readlink()).endswith(disk.BASE):
            assert int(inject(emulator(box), FCNTL, entry.name, F_GETFL)) & os.O_ACCMODE == os.O_RDONLY
            assert int(inject(emulator(box), PWRITE, entry.name, "@x", 1, 0)) == -EBADF


def test_a_taken_emulator_reaches_nobody(
    box: boxes.Box, other: boxes.Box, bystander: subprocess.Popen[bytes], inject: Callable[..., str]
) -> None:
    """Sockets lead nowhere: the host's loopback, and its abstract names; nor do ids of processes and segments."""
    name = f"hutch-taken-{os.getpid()}".encode()
    with closing(socket.socket(socket.AF_UNIX)) as abstract, closing(socket.socket()) as loopback:
        abstract.bind(b"\0" + name)
        abstract.listen()
        loopback.bind(("127.0.0.1", 0))
        loopback.listen()
        inet = struct.pack("=H", socket.AF_INET) + struct.pack(">H4s8x", loopback.getsockname()[1], b"\x7f\0\0\x01")
        unix = struct.pack("=H", socket.AF_UNIX) + b"\0" + name
        for family, address in ((socket.AF_INET, inet), (socket.AF_UNIX, unix)):
            for pid, result in ((bystander.pid, 0), (emulator(box), -ECONNREFUSED)):
                fd = inject(pid, SOCKET, int(family), int(socket.SOCK_STREAM | socket.SOCK_CLOEXEC), 0)
                assert int(inject(pid, CONNECT, fd, f"={address.hex()}", len(address))) == result, (family, pid)
    libc = ctypes.CDLL(None, use_errno=True)
    key = 0x6A000000 + os.getpid()
    segment = libc.shmget(key, 4096, 0o1666)
    try:
        assert int(inject(bystander.pid, SHMGET, key, 0, 0)) >= 0
        assert int(inject(emulator(box), SHMGET, key, 0, 0)) == -ENOENT
    finally:
        libc.shmctl(segment, 0, None)
    for pid in (os.getpid(), other.started.pid, emulator(other)):
        assert inject(bystander.pid, KILL, pid, 0) == "0"
        assert int(inject(emulator(box), KILL, pid, 0)) == -ESRCH
    # Its keeper, PID 1 there, has the same user; signals of the namespace do not end it.
    assert inject(emulator(box), KILL, 1, 9) == "0"
    assert int(inject(emulator(box), PTRACE, PTRACE_ATTACH, 1, 0, 0)) == -EPERM
    assert int(inject(emulator(box), OPEN, "@/proc/1/mem", os.O_RDWR)) == -ENOENT


FORBIDDEN = {
    "execve": (EXECVE, "@/nowhere", 0, 0),
    "unshare": (UNSHARE, 0x200),
    "mount": (MOUNT, "@none", "@/nowhere", "@tmpfs", 0, 0),
    "setuid": (SETUID, 0xFFFFFFFF),
}
"""In a form that changes nothing for whoever may make the call."""


def test_calls_that_the_emulator_is_denied(
    image: Path, vm_store: Path, tmp_path: Path, bystander: subprocess.Popen[bytes], inject: Callable[..., str]
) -> None:
    """New programs, namespaces, mounts, users: to ask for them is the end. The box can be ended then as any other."""
    for name, call in FORBIDDEN.items():
        assert int(inject(bystander.pid, *call)) in (0, -ENOENT, -EINVAL), name
    vm = VmEngine(vm_store)

    async def attempt(name: str, *call: object) -> None:
        async with boxes.running(vm, boxes.plan(tmp_path / name, image, limits=Limits(memory_mib=256))) as box:
            assert await anyio.to_thread.run_sync(inject, emulator(box), *call) == "killed", name
        assert not vm.observe(box.directory).running

    async def main() -> None:
        with anyio.fail_after(40):
            async with anyio.create_task_group() as tasks:
                for name, call in FORBIDDEN.items():
                    tasks.start_soon(attempt, name, *call)

    anyio.run(main)


def test_a_taken_emulator_has_no_more_calls_than_a_container(
    box: boxes.Box, bystander: subprocess.Popen[bytes], inject: Callable[..., str]
) -> None:
    """Interfaces of the kernel with a history, and keys: what joined the session of the host's user has them."""
    session = (KEYCTL, 0, -3, 0)  # the id of the session's key ring
    for call in (
        session,
        (PERF_EVENT_OPEN, 0, 0, -1, -1, 0),
        (BPF, 99, 0, 0),
        (USERFAULTFD, -1),
        (IO_URING_SETUP, 1, 0),
    ):
        assert int(inject(bystander.pid, *call)) not in (-EPERM, -ENOSYS), call
        assert int(inject(emulator(box), *call)) in (-EPERM, -ENOSYS), call
    # The one limit that keeps the kernel from handing its memory to a program of the host when it crashes (core(5)).
    limits = Path(f"/proc/{emulator(box)}/limits").read_text().splitlines()
    assert next(line.split()[4:6] for line in limits if line.startswith("Max core")) == ["1", "1"]


def test_a_taken_emulator_changes_no_priorities(
    box: boxes.Box, bystander: subprocess.Popen[bytes], inject: Callable[..., str]
) -> None:
    assert inject(bystander.pid, SETPRIORITY, 0, 0, 1) == "0"
    assert int(inject(emulator(box), SETPRIORITY, 0, 0, 1)) == -EPERM


def test_a_taken_emulator_uses_up_no_more_than_it_may_need(
    image: Path, vm_store: Path, tmp_path: Path, bystander: subprocess.Popen[bytes], inject: Callable[..., str]
) -> None:
    """The host's disk, memory and processes: its own files can grow so far, and to take all memory is the end."""
    vm = VmEngine(vm_store)
    (tmp_path / "file").touch()
    control = inject(bystander.pid, OPEN, f"@{tmp_path / 'file'}", os.O_RDWR)
    assert inject(bystander.pid, FTRUNCATE, control, 1 << 40) == "0"
    populated = (MMAP, 0, 3 << 30, 3, 0x8022, -1, 0)  # private, anonymous, there at once

    async def main() -> None:
        async with boxes.running(vm, boxes.plan(tmp_path / "box", image, limits=Limits(memory_mib=96))) as box:
            pid = emulator(box)
            ignored = Path(f"/proc/{pid}/status").read_text().split("SigIgn:")[1].split()[0]
            assert int(ignored, 16) >> (signal.SIGXFSZ - 1) & 1  # so that it gets an error
            own = next(entry for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.readlink().name == disk.DISK)
            assert int(inject(pid, FTRUNCATE, own.name, 1 << 40)) == -EFBIG
            entry = record.alive(box.directory)
            group = None if entry is None else entry.group._at("pids")
            assert group is not None and int(Path(group.file("pids.max")).read_text()) <= 300
            with anyio.fail_after(40):
                assert await anyio.to_thread.run_sync(inject, pid, *populated) == "killed"
            assert await poll_until(lambda: not vm.observe(box.directory).running, 10)

    anyio.run(main)
