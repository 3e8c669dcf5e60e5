"""What this machine can do for boxes: each ability is tried for real where that is harmless and quick.

Nothing is changed: probes work in namespaces of their own and in a temporary directory on the home's disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import platform
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hutch.errors import EngineError
from hutch.host import kvm, loopdisk
from hutch.host.binary import agent_path

if TYPE_CHECKING:
    from collections.abc import Iterator

# Unprivileged overlay mounts and idmapped mounts.
_OLDEST_KERNEL = (5, 12)
_LOW_DISK, _NO_DISK = 5 << 30, 256 << 20
_PROBE_SECONDS = 10.0
_LIMIT_CONTROLLERS = ("cpu", "memory", "pids")
_SUBIDS = 65536


class Status(enum.StrEnum):
    """How a check went. ``warn``: boxes run, with less."""

    OK = "ok"
    WARN = "warn"
    MISSING = "missing"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One finding. ``gives``: what for; ``remedy``: the command that helps; ``needed``: by every box."""

    name: str
    status: Status
    found: str
    gives: str
    remedy: str = ""
    needed: bool = False


def able(checks: list[Check]) -> bool:
    """Whether boxes can run."""
    return not any(check.needed and check.status is Status.MISSING for check in checks)


def examine(home: str | Path | None = None) -> list[Check]:
    """Examine the machine for a home directory (default ``$HUTCH_HOME`` or ``~/.hutch``), present or not."""
    root = os.geteuid() == 0
    base = _existing(Path(home or os.environ.get("HUTCH_HOME") or "~/.hutch").expanduser())
    checks = [_kernel(), _architecture(), _agent(), _seccomp(), _namespaces()]
    with _workspace(base) as directory:
        checks.append(_overlay(directory, root=root))
        checks.append(_idmapped(directory) if root else _subordinate_ids())
    checks += [_cgroups(), _disk_limits(), _disk(base), _kvm(), _vm_kernel(base), _network()]
    checks += [_program(*tool) for tool in _TOOLS]
    return checks


_TOOLS = (
    ("qemu-system-x86_64", "micro-VM boxes", "qemu-system-x86"),
    ("mmdebstrap", "`hutch image bootstrap` of a Debian base", "mmdebstrap"),
)


def _kernel() -> Check:
    release = platform.release()
    numbers = release.split("-")[0].split(".")
    version = tuple(int(number) for number in numbers[:2] if number.isdigit())
    good = version >= _OLDEST_KERNEL
    return Check(
        name="kernel",
        status=Status.OK if good else Status.MISSING,
        found=f"Linux {release}",
        gives="overlay and idmapped mounts, pidfds",
        remedy="" if good else "boot a Linux kernel of version {}.{} or newer".format(*_OLDEST_KERNEL),
        needed=True,
    )


def _architecture() -> Check:
    machine = platform.machine()
    good = machine == "x86_64"
    return Check(
        name="architecture",
        status=Status.OK if good else Status.MISSING,
        found=machine,
        gives="the system call filter is written for x86_64",
        remedy="" if good else "use an x86_64 machine",
        needed=True,
    )


def _agent() -> Check:
    try:
        found, remedy = str(agent_path()), ""
    except EngineError as error:
        found, remedy = str(error), "make -C agent"
    return Check(
        name="agent",
        status=Status.MISSING if remedy else Status.OK,
        found=found,
        gives="starts boxes and runs commands in them",
        remedy=remedy,
        needed=True,
    )


def _seccomp() -> Check:
    with contextlib.suppress(OSError):
        actions = Path("/proc/sys/kernel/seccomp/actions_avail").read_text().split()
        return Check(
            name="seccomp",
            status=Status.OK,
            found=" ".join(actions),
            gives="the system call filter",
            needed=True,
        )
    return Check(
        name="seccomp",
        status=Status.MISSING,
        found="the kernel has no seccomp filters",
        gives="the system call filter",
        remedy="boot a kernel with CONFIG_SECCOMP_FILTER",
        needed=True,
    )


def _namespaces() -> Check:
    problem = _try("unshare", "-U", "-r", "-p", "-f", "-m", "-n", "-i", "-u", "-C", "true")
    blockers = {
        "/proc/sys/user/max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=65536"),
        "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    }
    remedies = [remedy for path, (bad, remedy) in blockers.items() if _content(path) == bad]
    return Check(
        name="namespaces",
        status=Status.MISSING if problem else Status.OK,
        found=problem or "user, pid, mount, network, ipc, uts and cgroup namespaces can be made",
        gives="isolation",
        remedy=("; ".join(remedies) or "allow user namespaces to this user") if problem else "",
        needed=True,
    )


def _overlay(directory: Path | None, *, root: bool) -> Check:
    problem = "the home directory is not writable"
    if directory is not None:
        for name in ("lower", "upper", "work", "merged"):
            (directory / name).mkdir()
        options = "lowerdir=lower,upperdir=upper,workdir=work" + ("" if root else ",userxattr")
        script = f'cd "$0" && mount -t overlay overlay -o {options} merged && : > merged/file'
        problem = _try("unshare", "-m", *(() if root else ("-U", "-r")), "sh", "-c", script, str(directory))
    where = "" if root else " in a user namespace"
    return Check(
        name="overlayfs",
        status=Status.MISSING if problem else Status.OK,
        found=problem or f"mounts{where} on the home's file system",
        gives="the disks of boxes",
        remedy="modprobe overlay; put the home on ext4, xfs or btrfs (--home)" if problem else "",
        needed=True,
    )


def _idmapped(directory: Path | None) -> Check:
    problem = "the home directory is not writable" if directory is None else _try_idmapped_mount(directory)
    return Check(
        name="idmapped mounts",
        status=Status.MISSING if problem else Status.OK,
        found=problem or "work on the home's file system",
        gives="image layers shared by boxes with users of their own",
        remedy="put the home on ext4, xfs or btrfs (--home)" if problem else "",
        needed=True,
    )


def _try_idmapped_mount(directory: Path) -> str:
    """Make a detached idmapped mount of a directory (mount_setattr(2)); return what went wrong."""
    open_tree, mount_setattr = 428, 442  # the numbers are the same on all architectures
    at_fdcwd, at_empty_path, open_tree_clone, mount_attr_idmap = -100, 0x1000, 1, 0x100000
    libc = ctypes.CDLL(None, use_errno=True)
    # The helper answers once it has its user namespace with a map, and holds it until its input ends.
    with subprocess.Popen(
        ["unshare", "-U", "-r", "sh", "-c", "echo; cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as helper:
        assert helper.stdout is not None
        if not helper.stdout.readline():
            return "no user namespace to map to"
        namespace = os.open(f"/proc/{helper.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            tree = libc.syscall(open_tree, at_fdcwd, os.fsencode(directory), open_tree_clone | os.O_CLOEXEC)
            if tree < 0:
                return f"open_tree: {os.strerror(ctypes.get_errno())}"
            attributes = (ctypes.c_uint64 * 4)(mount_attr_idmap, 0, 0, namespace)
            result = libc.syscall(
                mount_setattr,
                tree,
                b"",
                at_empty_path,
                attributes,
                ctypes.c_size_t(ctypes.sizeof(attributes)),
            )
            errno = ctypes.get_errno()
            os.close(tree)
            return "" if result == 0 else f"mount_setattr: {os.strerror(errno)}"
        finally:
            os.close(namespace)


def _subordinate_ids() -> Check:
    user = pwd.getpwuid(os.geteuid()).pw_name
    lacks = [tool for tool in ("newuidmap", "newgidmap") if not _which(tool)]
    ranges = [_subid_count(Path(path), user) for path in ("/etc/subuid", "/etc/subgid")]
    remedies = []
    if lacks:
        remedies.append("apt-get install -y uidmap")
    if min(ranges) < _SUBIDS:
        remedies.append(
            f"usermod --add-subuids 524288-{524288 + _SUBIDS - 1} --add-subgids 524288-{524288 + _SUBIDS - 1} {user}"
        )
    found = f"{', '.join(lacks)} not installed" if lacks else "newuidmap and newgidmap"
    return Check(
        name="subordinate ids",
        status=Status.WARN if remedies else Status.OK,
        found=f"{found}; {min(ranges)} ids for {user}",
        gives="several users in a box; without them it has only root",
        remedy="; ".join(remedies),
    )


def _subid_count(path: Path, user: str) -> int:
    total = 0
    for line in _content(str(path)).splitlines():
        owner, _, rest = line.partition(":")
        number = rest.rpartition(":")[2]
        if owner in (user, str(os.geteuid())) and number.isdigit():
            total = max(total, int(number))
    return total


def _cgroups() -> Check:
    """Which controllers this user may use: version 2 by delegation, version 1 hierarchy by hierarchy."""
    usable: dict[str, str] = {}
    versions = set()
    for line in _content("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        place, kind, options = before.split()[4], after.split()[0], after.split()[-1]
        if kind == "cgroup2":
            versions.add("v2")
            if os.access(place, os.W_OK):
                usable |= dict.fromkeys(_content(f"{place}/cgroup.controllers").split(), "v2")
        elif kind == "cgroup":
            versions.add("v1")
            if os.access(place, os.W_OK):
                for name in options.split(","):
                    usable.setdefault(name, "v1")
    lacking = [name for name in _LIMIT_CONTROLLERS if name not in usable]
    have = ", ".join(f"{name} ({usable[name]})" for name in _LIMIT_CONTROLLERS if name in usable)
    found = f"{' and '.join(sorted(versions)) or 'none'}; {have or 'no controller'} writable"
    return Check(
        name="cgroups",
        status=Status.WARN if lacking else Status.OK,
        found=found + (f", {', '.join(lacking)} not" if lacking else ""),
        gives="limits of CPU, memory and processes",
        remedy="run as root, or under `systemd-run --user --scope -p Delegate=yes`" if lacking else "",
    )


def _disk_limits() -> Check:
    problem = loopdisk.problem()
    installable = os.geteuid() == 0 and "not installed" in problem
    return Check(
        name="disk limits",
        status=Status.WARN if problem else Status.OK,
        found=problem or "ext4 on loop devices",
        gives="limits of disk space",
        remedy=""
        if not problem
        else "apt-get install -y e2fsprogs"
        if installable
        else "run as root of a host with loop devices",
    )


def _disk(base: Path) -> Check:
    free = shutil.disk_usage(base).free
    status = Status.MISSING if free < _NO_DISK else Status.WARN if free < _LOW_DISK else Status.OK
    return Check(
        name="disk space",
        status=status,
        found=f"{free / (1 << 30):.1f} GiB free at {base}",
        gives="room for images and boxes",
        remedy="" if status is Status.OK else "hutch image prune --all, or another --home",
        needed=True,
    )


def _kvm() -> Check:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        status, found = Status.MISSING, f"/dev/kvm: {error.strerror}"
    else:  # some machines have the device and only emulate behind it, so opening it proves nothing
        native = kvm.usable()
        status = Status.OK if native else Status.WARN
        found = "runs guests at full speed" if native else "present, but guests crawl: VMs are translated instead"
    return Check(name="kvm", status=status, found=found, gives="micro-VM boxes at full speed")


def _vm_kernel(base: Path) -> Check:
    current = base / "vm/kernels/current"
    found = current.read_text().strip() if current.exists() else ""
    return Check(
        name="vm kernel",
        status=Status.OK if found else Status.WARN,
        found=found or "not fetched yet",
        gives="micro-VM boxes",
        remedy="" if found else "hutch setup vm",
    )


def _network() -> Check:
    """Load rules like those of a box's door into a network namespace of our own."""
    rules = "table inet probe { chain c { type nat hook output priority -100; meta l4proto tcp redirect to :1; }; }"
    path = _which("nft")
    problem = "nft is not installed" if path is None else _try("unshare", "-U", "-r", "-n", path, rules)
    remedy = "apt-get install -y nftables" if path is None else "modprobe nft_redir; allow user namespaces"
    return Check(
        name="nft",
        status=Status.MISSING if path is None else Status.WARN if problem else Status.OK,
        found=problem or "nft redirects work in a network namespace",
        gives="networks of boxes; without it they have none",
        remedy=remedy if problem else "",
    )


def _program(name: str, gives: str, package: str) -> Check:
    path = _which(name)
    return Check(
        name=name,
        status=Status.OK if path else Status.MISSING,
        found=path or "not installed",
        gives=gives,
        remedy="" if path else f"apt-get install -y {package}",
    )


def _which(name: str) -> str | None:
    # Administrators' programs are often not on an ordinary user's path.
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin")


def _try(*command: str) -> str:
    """Run a probe; return what went wrong."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    message = done.stderr.decode("utf-8", "replace").strip().replace("\n", "; ")
    return "" if done.returncode == 0 else message or f"{command[0]} failed ({done.returncode})"


def _content(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


@contextlib.contextmanager
def _workspace(base: Path) -> Iterator[Path | None]:
    """A temporary directory on the home's file system, `None` where nothing can be written."""
    try:
        directory = tempfile.TemporaryDirectory(prefix=".hutch-doctor-", dir=base)
    except OSError:
        yield None
        return
    with directory as name:
        yield Path(name)
