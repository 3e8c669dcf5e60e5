"""A guest that counts down from five millions in 64-bit mode, under KVM; run as a program by `hutch.host.kvm`.

Kernel's virt/kvm/api.rst; Intel SDM volume 3, 3.4.5 (segment descriptors) and 4.5 (paging).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct

LOOPS = 5_000_000
_MEMORY = 4 << 20
_API_VERSION = 12
_GET_API_VERSION, _CREATE_VM, _GET_VCPU_MMAP_SIZE = 0xAE00, 0xAE01, 0xAE04
_CREATE_VCPU, _SET_TSS_ADDR, _SET_MEMORY, _RUN = 0xAE41, 0xAE47, 0x4020AE46, 0xAE80
_GET_SREGS, _SET_SREGS, _SET_REGS = 0x8138AE83, 0x4138AE84, 0x4090AE82
_SREGS_SIZE, _APIC_BASE, _CONTROL, _TABLES = 312, 272, 224, 192
_EXIT_IO = 2
_GDT, _TOP, _MIDDLE, _LOW, _STACK, _CODE = 0x1000, 0x2000, 0x3000, 0x4000, 0x9000, 0x10000
_PRESENT_WRITABLE, _LARGE_PAGE = 0x7, 0x87


def run() -> None:
    """Write ``S`` when the guest starts, ``N`` when it has come to its end."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    if fcntl.ioctl(kvm, _GET_API_VERSION) != _API_VERSION:
        return
    vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
    ctypes.CDLL(None).ioctl(vm, ctypes.c_ulong(_SET_TSS_ADDR), ctypes.c_ulong(0xFFFBD000))
    memory = mmap.mmap(-1, _MEMORY)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, _SET_MEMORY, struct.pack("<IIQQQ", 0, 0, 0, _MEMORY, place))
    cpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
    shared = mmap.mmap(cpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE))
    _fill(memory)
    registers = bytearray(fcntl.ioctl(cpu, _GET_SREGS, bytes(_SREGS_SIZE)))
    _enter_long_mode(registers)
    fcntl.ioctl(cpu, _SET_SREGS, bytes(registers))
    general = (0, 0, 0, 0, 0, 0, _STACK, *(0,) * 9, _CODE, 2)
    fcntl.ioctl(cpu, _SET_REGS, struct.pack("<18Q", *general))
    os.write(1, b"S")
    fcntl.ioctl(cpu, _RUN, 0)
    if struct.unpack_from("<I", shared, 8)[0] == _EXIT_IO:
        os.write(1, b"N")


def _fill(memory: mmap.mmap) -> None:
    struct.pack_into("<3Q", memory, _GDT, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
    struct.pack_into("<Q", memory, _TOP, _MIDDLE | _PRESENT_WRITABLE)
    struct.pack_into("<Q", memory, _MIDDLE, _LOW | _PRESENT_WRITABLE)
    struct.pack_into("<2Q", memory, _LOW, _LARGE_PAGE, 1 << 21 | _LARGE_PAGE)
    # mov ecx, LOOPS; again: dec ecx; jnz again; out 0xf4, al
    code = b"\xb9" + struct.pack("<I", LOOPS) + b"\xff\xc9\x75\xfc\xe6\xf4"
    memory[_CODE : _CODE + len(code)] = code


def _enter_long_mode(registers: bytearray) -> None:
    def segment(selector: int, kind: int, long: int, default: int) -> bytes:
        return struct.pack("<QIHBBBBBBBBBB", 0, 0xFFFFFFFF, selector, kind, 1, 0, default, 1, long, 1, 0, 0, 0)

    registers[0:24] = segment(8, 11, 1, 0)
    for number in range(1, 6):
        registers[24 * number : 24 * number + 24] = segment(16, 3, 0, 1)
    registers[_TABLES:_CONTROL] = struct.pack("<QH6xQH6x", _GDT, 23, 0, 0)
    apic = struct.unpack_from("<Q", registers, _APIC_BASE)[0]
    paging_protected, physical_extension, long_mode = 0x8000_0011, 0x20, 0x500
    control = struct.pack("<7Q", paging_protected, 0, _TOP, physical_extension, 0, long_mode, apic)
    registers[_CONTROL : _CONTROL + len(control)] = control


if __name__ == "__main__":
    run()
