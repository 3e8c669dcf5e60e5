"""The bodies of requests and responses. Requests are closed and strict: an unknown field, or a number given as text,
is refused by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AllowInfNan, BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", examples=["worker-1"])]
VolumeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{1,127}$", examples=["data"])]
Seconds = Annotated[int, Field(ge=0, le=4_000_000)]
Env = dict[str, str]
Mode = Literal["enabled", "disabled"]


class Request(BaseModel):
    """A request body."""

    model_config = ConfigDict(extra="forbid", strict=True)


AllowNet = Annotated[
    list[str],
    Field(
        max_length=1024,
        description="whom the box may reach; empty: everybody. Addresses, networks, names, `*.` names, with a port, "
        "a range of ports or none",
        examples=[["api.example.com:443", "10.1.0.0/16"]],
    ),
]


class NetworkRule(Request):
    """One direction of a box's network."""

    mode: Mode
    allow_net: AllowNet = []


class PortRequest(Request):
    """A port of the box that is to be reached at one of the server's machine."""

    guest_port: int = Field(ge=1, le=65535)
    host_port: int = Field(default=0, ge=0, le=65535, description="0: one that is free, chosen at each start")
    protocol: Literal["tcp", "udp"] = "tcp"


class NetworkRequest(Request):
    """The network of a box, by direction; ``mode`` and ``allow_net`` alone are the older form, for outbound. In that,
    ``enabled`` without a list is what clients send that have no wish: they get what the server has for such."""

    mode: Mode | None = None
    allow_net: AllowNet | None = None
    outbound: NetworkRule | None = None
    inbound: NetworkRule | None = Field(
        default=None, description="`enabled`: the tunnels of the box are for all who know their URI"
    )
    published_ports: list[PortRequest] = Field(default=[], max_length=1024)


class SecretRequest(Request):
    """A secret: the box sees the placeholder, in the variables NAME and BOXLITE_SECRET_NAME, and the value takes its
    place in requests to the hosts."""

    name: str = Field(examples=["API_KEY"])
    value: str = Field(repr=False, json_schema_extra={"writeOnly": True}, description="never shown again")
    hosts: list[str] = Field(default=[], max_length=1024, examples=[["api.example.com"]])
    placeholder: str | None = Field(default=None, description="by default `<BOXLITE_SECRET:NAME>`")


class VolumeMount(Request):
    """A volume, seen by the box at ``guest_path``."""

    managed_volume: str | None = Field(default=None, description="name or id of the volume")
    host_path: str | None = Field(default=None, description="not taken over this interface")
    guest_path: str
    read_only: bool = False


class CapabilitiesRequest(Request):
    """Linux capabilities."""

    add: list[str] = []
    drop: list[str] = []


class AdvancedRequest(Request):
    """Rarely used options."""

    capabilities: CapabilitiesRequest | None = None


class CreateBox(Request):
    """A new box."""

    name: Name | None = None
    image: str | None = Field(default=None, min_length=1, max_length=1024, examples=["debian:12"])
    rootfs_path: str | None = Field(default=None, description="not taken over this interface")
    cpus: int | None = Field(default=None, ge=1, le=32)
    memory_mib: int | None = Field(default=None, ge=128, le=65536)
    disk_size_gb: int | None = Field(default=None, ge=1, le=1024)
    working_dir: str | None = None
    user: str | None = None
    env: Env = {}
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    tty: bool = False
    detach: bool = Field(default=True, description="boxes always outlive the server; accepted for older clients")
    auto_stop: Seconds | None = Field(default=None, description="seconds of idleness before it is stopped: 0 or >= 60")
    auto_delete: Seconds | None = Field(
        default=None, description="seconds of idleness before a stopped box is removed: 0 or >= 60"
    )
    auto_resume: bool | None = Field(default=None, description="true: also a box that was stopped on request")
    labels: dict[str, str] = {}
    isolation: Literal["auto", "vm", "container"] | None = Field(
        default=None, description="how it is kept apart from the host: one of those in the configuration"
    )
    network: NetworkRequest | None = None
    secrets: list[SecretRequest] = []
    volumes: list[VolumeMount] = Field(default=[], max_length=64)
    advanced: AdvancedRequest | None = None


class StopRequest(Request):
    """How to stop."""

    timeout_seconds: float = Field(default=5.0, ge=0, le=600, description="grace before SIGKILL", strict=False)


class ExecRequest(Request):
    """A command to start."""

    command: str = Field(min_length=1)
    args: list[str] = []
    env: Env = {}
    working_dir: str | None = None
    user: str | None = None
    timeout_seconds: Annotated[float, AllowInfNan(False)] | None = Field(default=None, ge=0, le=4_000_000)
    tty: bool = False
    rows: int = Field(default=24, ge=1, le=65535)
    cols: int = Field(default=80, ge=1, le=65535)


class SignalRequest(Request):
    """A signal for the command's process group."""

    signal: int = Field(description="1, 2, 3, 6, 10, 12, 15 or 28; SIGKILL goes by DELETE of the execution")


class ResizeRequest(Request):
    """The new size of the terminal."""

    cols: int = Field(ge=1, le=65535)
    rows: int = Field(ge=1, le=65535)


class SnapshotRequest(Request):
    """A name for a snapshot."""

    name: Name


class CloneRequest(Request):
    """A name for a copy."""

    name: Name | None = None


class ExportRequest(Request):
    """There are no options yet."""


class VolumeRequest(Request):
    """A new volume."""

    name: VolumeName | None = None


class AliasRequest(Request):
    """A tag for an image version."""

    alias: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")
    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")


class RegistryRequest(Request):
    """A login at a registry, for pulls of the repositories below the prefix."""

    registry_host: str = Field(min_length=1, max_length=255, examples=["registry.example:5000"])
    repository_prefix: str = Field(default="", max_length=255)
    username: str = Field(min_length=1, max_length=1024)
    password: str = Field(min_length=1, max_length=65536, json_schema_extra={"writeOnly": True}, repr=False)


class ErrorBody(BaseModel):
    """What went wrong: a sentence, and a stable code."""

    message: str
    type: str
    code: str
    request_id: str


class ErrorResponse(BaseModel):
    """Every error has this form."""

    error: ErrorBody


class NetworkState(BaseModel):
    """One direction as it is."""

    mode: Mode
    allow_net: list[str] = []


class PortView(BaseModel):
    """A port of the server's machine that leads to one of the box; ``host_port`` 0: chosen at the start."""

    guest_port: int
    host_ip: str
    host_port: int
    protocol: Literal["tcp", "udp"]


class NetworkView(BaseModel):
    """The network of a box as it is."""

    outbound: NetworkState
    inbound: NetworkState
    published_ports: list[PortView] = []
    send_rate: int | None = Field(description="bytes a second that it may send at most; null: no limit")
    receive_rate: int | None = Field(description="bytes a second that it may receive at most; null: no limit")


class TunnelGranted(BaseModel):
    """Where a port of a box is reached: connect to the authority, and send `CONNECT` or an ordinary HTTP request."""

    uri: str = Field(examples=["http://127.0.0.1:40123/"])


class TunnelView(BaseModel):
    """A tunnel. Where it is only those know who may ask for it."""

    port: int
    created_at: str
    connections: int


class TunnelList(BaseModel):
    """The tunnels of one box."""

    tunnels: list[TunnelView]


class BoxView(BaseModel):
    """A box."""

    box_id: str
    name: str | None
    status: Literal["configured", "running", "stopping", "stopped", "paused", "failed", "unknown"]
    created_at: str
    updated_at: str
    image: str
    cpus: int = Field(description="its limit; without one, what the machine has")
    memory_mib: int = Field(description="its limit; without one, what the machine has")
    disk_size_gb: int | None
    pid: int | None
    labels: dict[str, str]
    auto_stop: int
    auto_delete: int
    auto_resume: bool
    last_activity_at: str | None
    started_at: str | None
    exit_code: int | None
    reason: str | None
    isolation: str
    unenforced: list[str] = Field(description="limits that this machine cannot enforce")
    network: NetworkView


class BoxList(BaseModel):
    """Boxes, oldest first."""

    boxes: list[BoxView]
    next_page_token: str | None = None


class ExecStarted(BaseModel):
    """The execution that was started."""

    execution_id: str


class ExecView(BaseModel):
    """An execution. ``status`` stays ``running`` while output is still owed to a client."""

    execution_id: str
    status: Literal["running", "completed", "killed", "timed_out"]
    exit_code: int | None
    command: str
    tty: bool
    attached: bool
    started_at: str
    ended_at: str | None
    duration_ms: int | None
    error_message: str | None = None


class ExecList(BaseModel):
    """Executions of one box."""

    executions: list[ExecView]
    next_page_token: str | None = None


class SnapshotView(BaseModel):
    """A saved disk; ``created_at`` is in Unix seconds."""

    id: str
    box_id: str
    name: str
    created_at: int
    container_disk_bytes: int
    size_bytes: int


class SnapshotList(BaseModel):
    """The snapshots of one box."""

    snapshots: list[SnapshotView]
    next_page_token: str | None = None


class VolumeView(BaseModel):
    """A managed volume."""

    id: str
    name: str
    created_at: str
    size_bytes: int | None
    state: str = "ready"


class VolumeList(BaseModel):
    """All volumes."""

    volumes: list[VolumeView]
    next_page_token: str | None = None


class ImageRow(BaseModel):
    """One name of an image."""

    reference: str
    repository: str
    tag: str
    id: str
    cached_at: str
    size_bytes: int


class ImageList(BaseModel):
    """All names of all images."""

    images: list[ImageRow]
    next_page_token: str | None = None


class ImageVersion(BaseModel):
    """One state of an image."""

    digest: str
    source_ref: str
    recorded_at: str
    aliases: list[str]
    size_bytes: int | None
    last_used_at: str | None = None
    upstream_missing_at: str | None = None


class AliasView(BaseModel):
    """An alias was given to a version, and may have been taken from another one."""

    alias: str
    from_digest: str | None
    to_digest: str
    recorded_at: str
    actor: str | None


class ImageDetail(BaseModel):
    """All that is known about an image."""

    name: str
    curated: bool = False
    aliases: list[str]
    versions: list[ImageVersion]
    history: list[AliasView] = Field(default=[], description="of aliases that were given here, the latest first")


class ImageUsage(BaseModel):
    """What the images take; ``limit`` is 0 where there is none."""

    count: int
    limit: int
    known_bytes: int


class RegistryView(BaseModel):
    """A login at a registry, without its password."""

    id: str
    registry_host: str
    repository_prefix: str
    username: str
    created_at: str
    created_by: str | None = None


class RegistryList(BaseModel):
    """All logins."""

    registries: list[RegistryView]
    next_page_token: str | None = None


class BootTiming(BaseModel):
    """How long the making of a box took, as far as this server has seen it."""

    total_create_ms: int | None
    container_init_ms: int | None


class BoxMetrics(BaseModel):
    """What a box has done and uses."""

    commands_executed_total: int
    exec_errors_total: int
    bytes_sent_total: int
    bytes_received_total: int
    cpu_percent: float | None
    memory_bytes: int | None
    network_bytes_sent: int | None = None
    network_bytes_received: int | None = None
    network_tcp_connections: int | None = None
    network_tcp_errors: int | None = None
    boot_timing: BootTiming | None


class RuntimeMetrics(BaseModel):
    """What this server has done since its start."""

    boxes_created_total: int
    boxes_failed_total: int
    boxes_stopped_total: int
    num_running_boxes: int
    total_commands_executed: int
    total_exec_errors: int


class Capabilities(BaseModel):
    """What this server can do."""

    snapshots_enabled: bool = True
    clone_enabled: bool = True
    export_enabled: bool = True
    import_enabled: bool = True
    linux_capabilities_enabled: bool = False
    network_enabled: bool = Field(description="whether boxes can have a network")
    secrets_enabled: bool = Field(description="whether boxes can have secrets, which need a network")
    tunnels_enabled: bool = True
    image_alias_enabled: bool = True
    registry_credentials_enabled: bool = True


class ConfigView(BaseModel):
    """Discovery."""

    version: str
    capabilities: Capabilities
    isolations: list[str] = Field(description="what a client may choose; the first one is the default")
    defaults: dict[str, int]
    limits: dict[str, int]


class Me(BaseModel):
    """Whose key this is."""

    sub: str
    principal_type: Literal["user", "service_account"] = "service_account"
    scopes: list[str]
    path_prefix: str | None


class Health(BaseModel):
    """Whether the server works."""

    status: Literal["ok"] = "ok"
    version: str
