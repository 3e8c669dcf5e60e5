"""The command line of a VM's emulator. What is in `Shape` decides whether a template fits: the same devices in the same
order, as QEMU wants it of a state that it loads."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec

from hutch.engine.vm import nic
from hutch.engine.vm.kernel import Kernel
from hutch.errors import EngineError

PROGRAM = "qemu-system-x86_64"
LINE_FD, FILES_FD, FIRST_FD = 3, 4, 10
"""Where the emulator finds the line, the files of mounts, and the first of the descriptors that it is given
(agent/vm.c)."""
MEMORY = "/memory"

# Zeroing all memory before it is used hides what the guest's kernel left there from one box alone, and a tenth of the
# start went into it.
_KERNEL_LINE = (
    "quiet loglevel=3 console=ttyS0 panic=-1 no_timer_check audit=0 apparmor=0 lsm=landlock cryptomgr.notests "
    "rcupdate.rcu_expedited=1 init_on_alloc=0 random.trust_cpu=on i8042.noaux i8042.nopnp 8250.nr_uarts=1"
)
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# What the program needs of the host to run: libraries and firmware.
_HOST = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/qemu", "/usr/share/seabios", "/etc/ld.so.cache")
_FIRMWARE = (
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
)
_DEVICES = ("/dev/null", "/dev/urandom")
_PREPARED = "the card has no link"
"""What a template has been through beyond booting."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What makes one machine like another."""

    kernel: Kernel
    kvm: bool
    cpus: int
    memory_mib: int

    @property
    def key(self) -> str:
        """Changes when a template of this shape would not fit any more."""
        # Where the kernel lies means nothing; its own key says what it is.
        kernel = msgspec.structs.replace(self.kernel, image=Path(), initrd=Path())
        shape = msgspec.structs.replace(self, kernel=kernel)
        template = arguments(shape, Plan(memory=True, shared=True, disk=False))
        parts = (template, _PREPARED, self.kernel.key, _programs(), _processor() if self.kvm else "")
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What differs from machine to machine. ``memory``: ``None`` is the emulator's own, otherwise the launcher answers
    for the file; ``shared``: what the guest writes goes to it. ``frozen`` counts the images between base and disk;
    without a disk there is a placeholder. ``mounts``: there is somebody who serves files. ``incoming``: it waits for a
    saved state."""

    memory: bool = False
    shared: bool = False
    disk: bool = True
    frozen: int = 0
    mounts: bool = False
    incoming: bool = False


def program() -> Path:
    """Return the emulator. Raises `EngineError` when it is not installed."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise EngineError(f"{PROGRAM} is missing; install the Debian package qemu-system-x86")
    return Path(found).resolve()


def _programs() -> list[tuple[str, int, int]]:
    """Return what tells one build of the emulator and its firmware from another."""
    found = []
    for path in (program(), *map(Path, _FIRMWARE)):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((str(path), status.st_size, status.st_mtime_ns))
    return found


@functools.cache
def _processor() -> str:
    """Under KVM the guest sees the host's processor: a saved state fits no other."""
    wanted = ("model name", "flags", "microcode")
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    return f"{os.uname().release} " + " ".join(line for line in lines if line.startswith(wanted))


def host_files(shape: Shape) -> list[str]:
    """Return the paths of the host that the emulator sees."""
    found = [str(program()), *_HOST, *_DEVICES, str(shape.kernel.image.parent)]
    return [*found, "/dev/kvm"] if shape.kvm else found


def arguments(shape: Shape, plan: Plan) -> list[str]:
    """Return the command line. The emulator's descriptors are, in this order: the monitor's listening socket, and the
    files of the disk (base, frozen ones, its own)."""
    memory: dict[str, Any] = {"id": "mem", "size": shape.memory_mib << 20}
    memory |= (
        {"qom-type": "memory-backend-file", "mem-path": MEMORY, "share": plan.shared}
        if plan.memory
        else {"qom-type": "memory-backend-ram"}
    )
    argv = [
        *(str(program()), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-sandbox", _SANDBOX),
        *("-machine", "q35,memory-backend=mem,vmport=off,graphics=off,hpet=on,usb=off"),
        *(("-accel", "kvm", "-cpu", "host") if shape.kvm else ("-accel", "tcg,tb-size=64", "-cpu", "max,-erms")),
        *("-smp", str(shape.cpus), "-m", str(shape.memory_mib)),
        *("-object", msgspec.json.encode(memory).decode()),
        *_boot(shape, plan),
        *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=line,fd={LINE_FD}"),
        *("-chardev", f"socket,id=files,fd={FILES_FD}" if plan.mounts else "null,id=files"),
        # A translated guest shares the processors with the thread that it would have to wake for each write.
        *("-device", f"virtio-serial-pci,max_ports=3,ioeventfd={'on' if shape.kvm else 'off'}"),
        *("-device", "virtserialport,nr=1,chardev=line,name=hutch"),
        *("-device", "virtserialport,nr=2,chardev=files,name=files"),
        # Memory that the guest does not use any more is given back to the host.
        *("-device", "virtio-balloon-pci,free-page-reporting=on"),
        *("-chardev", f"socket,id=monitor,fd={FIRST_FD},server=on,wait=off", "-mon", "chardev=monitor,mode=control"),
        *nic.ARGUMENTS,
    ]
    nodes, count = _disk(plan)
    for number in range(count):
        argv += ["-add-fd", f"fd={FIRST_FD + 1 + number},set={number + 1}"]
    for node in nodes:
        argv += ["-blockdev", msgspec.json.encode(node).decode()]
    # Errors go to the guest: otherwise a full disk of the host would stop it.
    argv += ["-device", "virtio-blk-pci,drive=disk,werror=report,rerror=report"]
    return [*argv, "-incoming", "defer"] if plan.incoming else argv


def _boot(shape: Shape, plan: Plan) -> list[str]:
    """A machine whose state is loaded boots nothing, but it must have been given a kernel, or its devices differ. The
    beginning of one will do: what the emulator has read of it stays in its memory."""
    if plan.incoming:
        return ["-kernel", str(shape.kernel.stub), "-append", _KERNEL_LINE]
    return ["-kernel", str(shape.kernel.image), "-initrd", str(shape.kernel.initrd), "-append", _KERNEL_LINE]


def _disk(plan: Plan) -> tuple[list[dict[str, Any]], int]:
    """Return the block nodes, bottom first, and how many descriptors they take."""
    if not plan.disk:
        return [{"driver": "null-co", "node-name": "disk", "size": 1 << 30, "read-zeroes": True}], 0

    def file(number: int, read_only: bool) -> dict[str, Any]:
        # Boxes are started by whoever holds their lock; a lock on a shared base would only need rights to it.
        node = {"driver": "file", "filename": f"/dev/fdset/{number}", "read-only": read_only, "locking": "off"}
        return node if read_only else node | {"discard": "unmap"}

    nodes: list[dict[str, Any]] = [{"driver": "raw", "node-name": "n0", "read-only": True, "file": file(1, True)}]
    for number in range(1, plan.frozen + 2):
        own = number == plan.frozen + 1
        node = {"driver": "qcow2", "node-name": "disk" if own else f"n{number}", "read-only": not own}
        node |= {"file": file(number + 1, not own), "backing": f"n{number - 1}"}
        nodes.append(node | {"discard": "unmap"} if own else node)
    return nodes, plan.frozen + 2
