"""The value types that all layers share: frozen, without behaviour beyond checking themselves.

Sizes are bytes unless the name says otherwise (``memory_mib``, ``disk_gb``); times are seconds; times of day are
Unix seconds.
"""

from __future__ import annotations

import enum
import signal as _signal

import msgspec

# ``gc=False``: thousands of these are alive while boxes are listed, and none can be part of a cycle.


class BoxState(enum.StrEnum):
    """What a box is doing. The legal moves are in ``hutch.core.lifecycle``."""

    CONFIGURED = "configured"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    PAUSED = "paused"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Isolation(enum.StrEnum):
    """How a box is kept apart from the host."""

    AUTO = "auto"
    VM = "vm"
    CONTAINER = "container"


class Limits(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a box may use. ``None`` means no limit of its own."""

    cpus: int | None = None
    memory_mib: int | None = None
    disk_gb: int | None = None
    pids: int | None = 4096


class Mount(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A host folder or file, or a managed volume (``volume`` is its name), that a box sees at ``target``."""

    target: str
    source: str = ""
    volume: str = ""
    read_only: bool = False


class Outbound(enum.StrEnum):
    """Whom a box may reach over the network: nobody, anybody, or those in its list."""

    DISABLED = "disabled"
    ENABLED = "enabled"
    ALLOW_LIST = "allow-list"


class PublishedPort(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A port of a box that is reached at a port of the host. ``host_port`` 0: one that is free, chosen at each start
    (`BoxInfo.network` says which); ``host_ip``: an address of the host, which behind a server its operator chooses
    (empty: just that); ``protocol``: ``tcp`` or ``udp``."""

    port: int
    host_port: int = 0
    host_ip: str = "127.0.0.1"
    protocol: str = "tcp"


class NetPolicy(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The network of a box. ``allow``: the rules of the allow-list (docs/network.md); the rates: how many bytes a
    second it may send and receive at most (``None``: as many as the machine can carry)."""

    outbound: Outbound = Outbound.DISABLED
    allow: tuple[str, ...] = ()
    ports: tuple[PublishedPort, ...] = ()
    send_rate: int | None = None
    receive_rate: int | None = None


class NetBounds(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the operator of a server gives boxes of the machine's network. The rates: bytes a second that one box may
    send and receive at most (``None``: as many as the machine can carry). ``publish_address``: the address of the host
    at which ports are published (empty: none are), ``publish_ports`` the first and the last of the ports that are
    given there, ``publish_told`` what clients are told instead of the address (empty: the address), and
    ``max_published`` how many ports all boxes together may have."""

    send_rate: int | None = None
    receive_rate: int | None = None
    publish_address: str = ""
    publish_ports: tuple[int, int] = (20000, 29999)
    publish_told: str = ""
    max_published: int = 64


class Secret(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A value that a box may use without having it: in the box the variable ``name`` holds a placeholder, and the
    gateway puts the value in its place in the headers and the query of HTTPS requests to ``hosts`` (names, ``*.``
    names, with a port if that is not 443). ``value`` is empty where a box is described. ``placeholder``: another one
    than ``<HUTCH_SECRET:name>``. ``pass_opaque``: connections to the hosts into which the gateway cannot look (of
    clients that do not take its certificate, or what is not HTTP) are passed on untouched; otherwise they are refused.
    """

    name: str
    value: str
    hosts: tuple[str, ...]
    placeholder: str = ""
    pass_opaque: bool = False

    def __repr__(self) -> str:
        return f"Secret(name={self.name!r}, hosts={self.hosts!r})"


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt of a box to reach something that its policy does not allow, or that could not be reached. ``peer``:
    address and port, or the name that was looked up; ``name``: what the connection said that it wants."""

    time: float
    protocol: str
    peer: str
    name: str = ""
    reason: str


class BoxSpec(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a box is made from.

    ``command`` is the main command (``None``: the box has none and idles until someone executes something in it; an
    empty tuple: the one that the image names). A box with a main command lives as long as that command.
    """

    image: str
    name: str | None = None
    command: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    env: dict[str, str] = {}
    workdir: str | None = None
    user: str | None = None
    labels: dict[str, str] = {}
    limits: Limits = Limits()
    mounts: tuple[Mount, ...] = ()
    network: NetPolicy = NetPolicy()
    secrets: tuple[Secret, ...] = ()
    isolation: Isolation = Isolation.AUTO
    auto_remove: bool = False
    auto_resume: bool = False
    detach: bool = False
    hostname: str | None = None
    tty: bool = False
    open_stdin: bool = False
    stop_signal: str | None = None
    platform: str | None = None


class BoxInfo(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A snapshot of a box's record and state."""

    id: str
    name: str | None
    image: str
    image_digest: str
    state: BoxState
    isolation: Isolation
    created_at: float
    updated_at: float
    started_at: float | None = None
    stopped_at: float | None = None
    exit_code: int | None = None
    reason: str | None = None
    labels: dict[str, str] = {}
    command: tuple[str, ...] | None = None
    env: dict[str, str] = {}
    workdir: str = "/"
    user: str = ""
    limits: Limits = Limits()
    unenforced: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    network: NetPolicy = NetPolicy()
    secrets: tuple[Secret, ...] = ()
    auto_remove: bool = False
    auto_resume: bool = False
    detach: bool = False
    tty: bool = False
    open_stdin: bool = False
    pid: int | None = None


class ExecState(enum.StrEnum):
    """The state of one execution."""

    RUNNING = "running"
    COMPLETED = "completed"
    KILLED = "killed"
    TIMED_OUT = "timed_out"


class ExecInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One execution as the box reports it."""

    id: str
    state: ExecState
    pid: int
    exit_code: int | None
    tty: bool
    started_at: float
    ended_at: float | None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """How a command ended, and what it wrote where that was collected.

    ``exit_code`` is the exit code, or minus the number of the signal that ended the process. ``truncated`` says that
    bytes are missing from ``stdout`` or ``stderr`` (``dropped`` counts them); ``lingering`` that a background
    process still held the streams when they were given up.
    """

    exit_code: int
    stdout: bytes = b""
    stderr: bytes = b""
    timed_out: bool = False
    truncated: bool = False
    dropped: int = 0
    lingering: bool = False
    oom_killed: bool = False
    duration: float = 0.0
    user_seconds: float = 0.0
    system_seconds: float = 0.0
    max_rss: int = 0

    @property
    def ok(self) -> bool:
        """Whether the command ended with exit code 0."""
        return self.exit_code == 0

    @property
    def signal(self) -> _signal.Signals | None:
        """The signal that ended the command, if one did."""
        if self.exit_code >= 0:
            return None
        try:
            return _signal.Signals(-self.exit_code)
        except ValueError:
            return None

    @property
    def text(self) -> str:
        """Standard output as text (UTF-8, undecodable bytes replaced)."""
        return self.stdout.decode("utf-8", "replace")


class BoxStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a running box uses. ``None``: cannot be measured on this machine."""

    memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    cpu_seconds: float | None = None
    pids: int | None = None
    oom_kills: int | None = None
    disk_bytes: int | None = None
    uptime_seconds: float = 0.0
    commands_started: int = 0
    commands_failed: int = 0
    output_bytes: int = 0
    input_bytes: int = 0
    network_sent_bytes: int | None = None
    network_received_bytes: int | None = None
    network_connections: int | None = None


class FileInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One file in a box. ``type`` is file, directory, symlink, fifo, socket, char or block."""

    name: str
    type: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime: float
    target: str | None = None


class LogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of what the main command wrote."""

    time: float
    stream: str
    data: bytes


class SnapshotInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A saved disk of a box."""

    id: str
    name: str
    box_id: str
    size: int
    created_at: float


class VolumeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A managed volume."""

    id: str
    name: str
    created_at: float
    size: int = 0


class ImageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An image in the local store. ``digest`` is the config digest: the image's identity. ``size`` is that of the
    unpacked layers."""

    digest: str
    references: tuple[str, ...]
    manifest_digest: str
    architecture: str
    os: str
    size: int
    layers: tuple[str, ...]
    created_at: float
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""
    labels: dict[str, str] = {}
    stop_signal: str = ""


class LoginInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A login at a registry, for the repositories whose path begins with ``prefix``. The password is never told."""

    id: str
    registry: str
    username: str
    prefix: str = ""
    created_at: float


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """A step of long work. ``item`` is e.g. a layer digest; ``total`` is ``None`` while unknown; ``phase``: resolve,
    download, unpack, done, exists."""

    phase: str
    item: str = ""
    done: int = 0
    total: int | None = None
