"""Control groups: version 2 where its controllers are ours, else version 1 hierarchy by hierarchy, else none.

A box has one group, ``hutch/<box id>``, in each hierarchy that has one of the controllers we use. What cannot be
enforced is named, not hidden. Files and meanings: the kernel's admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from hutch.errors import EngineError
from hutch.host import proc

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hutch.types import Limits

CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "freezer", "devices")
CPU_PERIOD_US = 100_000
REMOVE_SECONDS = 10.0
FREEZE_SECONDS = 10.0

USUAL_DEVICES = ("1:3", "1:5", "1:7", "1:8", "1:9", "5:0", "5:2", "136:*")
"""null, zero, full, random, urandom, tty, ptmx, and pseudo terminals."""


class Parent(msgspec.Struct, frozen=True):
    """A folder below which groups of boxes are made, and the controllers that they get there.

    ``path`` is text: a start opens many of these files, and a `Path` for each would cost more than the kernel does.
    """

    path: str
    version: Literal[1, 2]
    controllers: frozenset[str]

    def file(self, name: str) -> str:
        """Return the path of what lies in the folder."""
        return f"{self.path}/{name}"


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a group uses; ``None`` where there is no controller to ask. Bytes and seconds."""

    memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    cpu_seconds: float | None = None
    pids: int | None = None
    oom_kills: int | None = None


def _read(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return None


def _write(path: str, *values: str | int) -> bool:
    """Write each of the values; returns whether the kernel took all."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    taken = True
    for value in values:
        try:
            os.write(fd, str(value).encode())
        except OSError:
            taken = False
    os.close(fd)
    return taken


def _keyed(path: str, key: str) -> int | None:
    """Return one value of a file of ``key value`` lines."""
    for line in (_read(path) or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return None


def _number(path: str) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdigit() else None


def _mounts() -> Iterable[tuple[Path, str, frozenset[str]]]:
    """Yield mount point, type and options of the cgroup file systems (proc_pid_mounts(5))."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split(" ")
        if kind in ("cgroup", "cgroup2"):
            yield Path(where.encode().decode("unicode_escape")), kind, frozenset(options.split(","))


def _own_path(kind: str) -> str:
    """Return this process's own version 2 group (an ordinary user may have been given it)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, _, path = line.split(":", 2)
        if kind == "cgroup2" and number == "0":
            return path.lstrip("/")
    return ""


def _prepare_v2(mount: Path) -> Parent | None:
    """Make ``hutch`` in the version 2 tree and hand our controllers down to it."""
    base = mount if os.geteuid() == 0 else mount / _own_path("cgroup2")
    wanted = set(CONTROLLERS) & set((_read(f"{base}/cgroup.controllers") or "").split())
    parent = base / "hutch"
    if not wanted:
        return None
    try:
        parent.mkdir(exist_ok=True)
    except OSError:
        return None
    got = set()
    for name in wanted:
        # Refused when processes live in `base` itself (the "no internal processes" rule) or when it is not ours.
        if _write(f"{base}/cgroup.subtree_control", f"+{name}") and _write(
            f"{parent}/cgroup.subtree_control", f"+{name}"
        ):
            got.add(name)
    if "cpu" in got:
        got.add("cpuacct")
    if not got:
        return None
    return Parent(str(parent), 2, frozenset(got | {"freezer"}))


def _prepare_v1(mount: Path, controllers: frozenset[str]) -> Parent | None:
    parent = mount / "hutch"
    try:
        parent.mkdir(exist_ok=True)
    except OSError:
        return None
    return Parent(str(parent), 1, controllers) if os.access(parent, os.W_OK) else None


@functools.cache
def parents() -> tuple[Parent, ...]:
    """Find (and make) where this process may make groups. Version 2 wins over version 1 for each controller."""
    found: list[Parent] = []
    seen: set[str] = set()
    for mount, kind, options in sorted(_mounts(), key=lambda entry: entry[1] == "cgroup"):
        if kind == "cgroup2":
            parent = _prepare_v2(mount)
        else:
            mine = frozenset(CONTROLLERS) & options - seen
            parent = _prepare_v1(mount, mine) if mine else None
        if parent is not None:
            found.append(parent)
            seen |= parent.controllers
    return tuple(found)


class Group(msgspec.Struct, frozen=True):
    """The groups of one box. A plain record, so that another process can take them away after a crash."""

    members: tuple[Parent, ...]
    """``path`` is the box's own folder here."""

    @classmethod
    def named(cls, name: str) -> Group:
        """Return the group that `create` would make. Touches nothing."""
        return cls(tuple(Parent(parent.file(name), parent.version, parent.controllers) for parent in parents()))

    def _at(self, controller: str) -> Parent | None:
        for member in self.members:
            if controller in member.controllers:
                return member
        return None

    def create(self, limits: Limits, *, devices: Sequence[str] = ()) -> tuple[str, ...]:
        """Make the groups and set the limits. ``devices``: those (major:minor) that are of use beyond the usual ones.
        Returns the names of the limits that are asked for and not enforceable here.

        Raises `EngineError`; the caller removes then what was made.
        """
        for member in self.members:
            try:
                os.mkdir(member.path)
            except FileExistsError:
                pass
            except OSError as error:
                raise EngineError(f"cannot make the control group {member.path}: {error.strerror}") from error
        self._limit_devices(devices)
        unenforced = []
        if limits.cpus is not None and not self._limit_cpus(limits.cpus):
            unenforced.append("cpus")
        if limits.memory_mib is not None and not self._limit_memory(limits.memory_mib << 20):
            unenforced.append("memory")
        if limits.pids is not None and not self._limit_pids(limits.pids):
            unenforced.append("pids")
        return tuple(unenforced)

    def _limit_cpus(self, cpus: int) -> bool:
        member = self._at("cpu")
        if member is None:
            return False
        quota = cpus * CPU_PERIOD_US
        if member.version == 2:
            return _write(member.file("cpu.max"), f"{quota} {CPU_PERIOD_US}")
        return _write(member.file("cpu.cfs_period_us"), CPU_PERIOD_US) and _write(
            member.file("cpu.cfs_quota_us"), quota
        )

    def _limit_memory(self, size: int) -> bool:
        """The limit covers swap too where the kernel can count it; where it cannot, the box does not swap."""
        member = self._at("memory")
        if member is None:
            return False
        if member.version == 2:
            _write(member.file("memory.swap.max"), 0)
            return _write(member.file("memory.max"), size)
        done = _write(member.file("memory.limit_in_bytes"), size)
        if not _write(member.file("memory.memsw.limit_in_bytes"), size):
            _write(member.file("memory.swappiness"), 0)
        return done

    def _limit_pids(self, pids: int) -> bool:
        member = self._at("pids")
        return member is not None and _write(member.file("pids.max"), pids)

    def _limit_devices(self, devices: Sequence[str]) -> None:
        """A second lock behind the user namespace, in which no device can be made anyway; version 2 has no files for
        it."""
        member = self._at("devices")
        if member is None or member.version == 2:
            return
        if _write(member.file("devices.deny"), "a"):
            _write(member.file("devices.allow"), *(f"c {device} rw" for device in (*USUAL_DEVICES, *devices)))

    def doors(self) -> tuple[str, ...]:
        """Return the files into which a single-threaded process writes "0" to join. (Version 1's ``tasks`` spares the
        kernel's global lock that ``cgroup.procs`` takes.)"""
        return tuple(member.file("tasks" if member.version == 1 else "cgroup.procs") for member in self.members)

    def usage(self) -> Measured:
        """Measure; reads a handful of small files."""
        memory, cpu, pids = self._at("memory"), self._at("cpuacct"), self._at("pids")
        values: dict[str, int | float | None] = {}
        if memory is not None:
            values.update(self._memory(memory))
        if cpu is not None and cpu.version == 2:
            used = _keyed(cpu.file("cpu.stat"), "usage_usec")
            values["cpu_seconds"] = None if used is None else used / 1e6
        elif cpu is not None:
            used = _number(cpu.file("cpuacct.usage"))
            values["cpu_seconds"] = None if used is None else used / 1e9
        if pids is not None:
            values["pids"] = _number(pids.file("pids.current"))
        return msgspec.convert(values, Measured)

    @staticmethod
    def _memory(member: Parent) -> dict[str, int | float | None]:
        """The page cache that can be dropped at once does not count as used."""
        two = member.version == 2
        used = _number(member.file("memory.current" if two else "memory.usage_in_bytes"))
        cache = _keyed(member.file("memory.stat"), "inactive_file" if two else "total_inactive_file") or 0
        limit = _number(member.file("memory.max" if two else "memory.limit_in_bytes"))
        return {
            "memory_bytes": None if used is None else max(0, used - cache),
            "memory_limit_bytes": None if limit is None or limit >= 1 << 60 else limit,
            "oom_kills": _keyed(member.file("memory.events" if two else "memory.oom_control"), "oom_kill"),
        }

    def can_freeze(self) -> bool:
        """Whether `freeze` works here."""
        return self._at("freezer") is not None

    async def freeze(self, frozen: bool) -> None:
        """Stop (or let run) all processes of the group; returns when the kernel says so. Raises `EngineError`."""
        member = self._at("freezer")
        if member is None:
            raise EngineError("this machine has no control group that can freeze processes")
        two = member.version == 2
        file, value = (
            ("cgroup.freeze", str(int(frozen))) if two else ("freezer.state", "FROZEN" if frozen else "THAWED")
        )

        def reached() -> bool:
            if two:
                return _keyed(member.file("cgroup.events"), "frozen") == int(frozen)
            return (_read(member.file(file)) or "").strip() == value

        if not _write(member.file(file), value) or not await proc.poll_until(reached, FREEZE_SECONDS):
            raise EngineError(f"cannot {'freeze' if frozen else 'thaw'} the control group {member.path}")

    def release(self) -> None:
        """Let frozen processes die when they are killed (those of version 1 would wait). Idempotent."""
        freezer = self._at("freezer")
        if freezer is not None and freezer.version == 1:
            _write(freezer.file("freezer.state"), "THAWED")

    async def remove(self) -> None:
        """Kill what is left in the groups, wait until they are empty, and delete them. Idempotent.

        Raises `EngineError`.
        """
        self.release()
        for member in self.members:
            if not await proc.poll_until(functools.partial(_remove_one, member.path), REMOVE_SECONDS):
                raise EngineError(f"the control group {member.path} does not become empty")


def _remove_one(path: str) -> bool:
    """One try: returns whether the group is gone."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise EngineError(f"cannot remove the control group {path}: {error.strerror}") from error
        for pid in map(int, (_read(f"{path}/cgroup.procs") or "").split()):
            if pid > 1:  # 0 would be a process that this pid namespace cannot name
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        return False
    return True
