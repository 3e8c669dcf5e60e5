"""From what a caller asked for to a checked specification, and from that and the image to settings."""

from __future__ import annotations

import ipaddress
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.core import ids
from hutch.core.policy import Policy, parse_rule
from hutch.core.secrets import placeholder
from hutch.errors import InvalidArgumentError
from hutch.runtime.checks import check_env, check_text, check_whole, quoted
from hutch.types import BoxSpec, Isolation, Limits, Mount, NetPolicy, Outbound, PublishedPort, Secret

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hutch.types import ImageInfo

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MIN_MEMORY_MIB = 128
MAX_MEMORY_MIB = 65536
MAX_CPUS = 32
MAX_DISK_GB = 1024
MAX_PIDS = 1 << 22
MIN_RATE = 1024
MAX_RATE = 1 << 40


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How commands run in a box, after the image's configuration was applied."""

    command: tuple[str, ...] | None
    env: dict[str, str]
    workdir: str
    user: str
    stop_signal: int


def build_spec(
    *,
    image: str,
    command: Sequence[str] | None,
    entrypoint: Sequence[str] | None,
    env: Mapping[str, str] | None,
    labels: Mapping[str, str] | None,
    cpus: int | None,
    memory_mib: int | None,
    disk_gb: int | None,
    pids: int | None,
    mounts: Sequence[Mount],
    network: NetPolicy | Outbound | str | Sequence[str],
    ports: Sequence[PublishedPort | int],
    secrets: Sequence[Secret],
    isolation: Isolation | str,
    **rest: Any,
) -> BoxSpec:
    """Make a specification from the arguments of ``create``. Raises `InvalidArgumentError`."""
    try:
        kind = Isolation(isolation)
    except ValueError:
        raise InvalidArgumentError(f"isolation {quoted(isolation)} is not one of auto, vm, container") from None
    for what, words in (("command", command), ("entrypoint", entrypoint)):
        if isinstance(words, str):
            raise InvalidArgumentError(
                f"{what} must be a list of words, not one string: ['sh', '-c', {quoted(words)}] perhaps"
            )
    try:
        return BoxSpec(
            image=image,
            command=None if command is None else tuple(command),
            entrypoint=None if entrypoint is None else tuple(entrypoint),
            env=dict(env or {}),
            labels=dict(labels or {}),
            limits=Limits(cpus=cpus, memory_mib=memory_mib, disk_gb=disk_gb, pids=pids),
            mounts=tuple(mounts),
            network=_network(network, ports),
            secrets=tuple(secrets),
            isolation=kind,
            **rest,
        )
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"command, entrypoint and mounts must be sequences, env and labels mappings: {error}"
        ) from None


def _network(network: NetPolicy | Outbound | str | Sequence[str], ports: Sequence[PublishedPort | int]) -> NetPolicy:
    published = tuple(port if isinstance(port, PublishedPort) else PublishedPort(port=port) for port in ports)
    if isinstance(network, NetPolicy):
        return msgspec.structs.replace(network, ports=network.ports + published)
    if isinstance(network, str):
        return build_network(network, None, published)
    return build_network(None, network, published)


def build_network(
    outbound: Outbound | str | None, allow: Sequence[str] | None, ports: tuple[PublishedPort, ...]
) -> NetPolicy:
    """Make a policy. Without ``outbound``: that of an allow-list if there is one. Raises `InvalidArgumentError`."""
    if isinstance(allow, str):
        raise InvalidArgumentError(f"allow must be a list of rules, not one string: [{quoted(allow)}] perhaps")
    try:
        kind = Outbound.DISABLED if allow is None else Outbound.ALLOW_LIST
        kind = kind if outbound is None else Outbound(outbound)
    except ValueError:
        raise InvalidArgumentError(f"outbound {quoted(outbound)} is not one of disabled, enabled, allow-list") from None
    policy = NetPolicy(outbound=kind, allow=tuple(allow or ()), ports=ports)
    check_network(policy)
    return policy


def check_spec(spec: BoxSpec) -> None:
    """Raise `InvalidArgumentError` naming the first field that is out of range."""
    _check_types(spec)
    if not spec.image:
        raise InvalidArgumentError("image must be a reference such as 'debian:12'")
    if spec.name is not None:
        ids.check_name(spec.name)
    _check_range("cpus", spec.limits.cpus, 1, MAX_CPUS)
    _check_range("memory_mib", spec.limits.memory_mib, MIN_MEMORY_MIB, MAX_MEMORY_MIB)
    _check_range("disk_gb", spec.limits.disk_gb, 1, MAX_DISK_GB)
    _check_range("pids", spec.limits.pids, 1, MAX_PIDS)
    check_env(spec.env)
    for word in (*(spec.command or ()), *(spec.entrypoint or ())):
        check_text("the word of a command", word)
    if spec.user is not None:
        check_text("user", spec.user)
    if spec.workdir is not None and (not spec.workdir.startswith("/") or "\0" in spec.workdir):
        raise InvalidArgumentError(f"workdir {quoted(spec.workdir)} must be an absolute path")
    if spec.hostname is not None and (
        not 1 <= len(spec.hostname) <= 64 or not spec.hostname.replace("-", "").replace(".", "").isalnum()
    ):
        raise InvalidArgumentError(f"hostname {quoted(spec.hostname)} is not valid")
    if spec.stop_signal is not None:
        signal_number(spec.stop_signal)
    check_network(spec.network)
    _check_secrets(spec.secrets)
    targets: set[str] = set()
    for mount in spec.mounts:
        _check_mount(mount)
        if mount.target in targets:
            raise InvalidArgumentError(f"two mounts have the target {quoted(mount.target)}")
        targets.add(mount.target)


def signal_number(name: str) -> int:
    """Return the number of a signal given as ``SIGTERM``, ``TERM`` or ``15``. Raises `InvalidArgumentError`."""
    text = name.strip().upper()
    if text.isdecimal():
        if 1 <= int(text) <= 64:
            return int(text)
    else:
        found = getattr(signal, text if text.startswith("SIG") else "SIG" + text, None)
        if isinstance(found, signal.Signals):
            return int(found)
    raise InvalidArgumentError(f"{quoted(name)} is not a signal")


def resolve(spec: BoxSpec, image: ImageInfo) -> Settings:
    """Apply the image's configuration (OCI image spec, "Conversion to OCI Runtime Configuration")."""
    env = {"PATH": DEFAULT_PATH}
    for entry in image.env:
        name, separator, value = entry.partition("=")
        if separator and name and "\0" not in entry:
            env[name] = value
    env.update(spec.env)
    workdir = spec.workdir or image.workdir or "/"
    return Settings(
        command=_command(spec, image),
        env=env,
        workdir=workdir if workdir.startswith("/") else "/" + workdir,
        user=image.user if spec.user is None else spec.user,
        stop_signal=_stop_signal(spec, image),
    )


def _command(spec: BoxSpec, image: ImageInfo) -> tuple[str, ...] | None:
    if spec.command is None and spec.entrypoint is None:
        return None
    entrypoint = image.entrypoint if spec.entrypoint is None else spec.entrypoint
    # An entrypoint of the caller's own drops the image's command, as everywhere else.
    fallback = image.cmd if spec.entrypoint is None else ()
    command = tuple(entrypoint) + tuple(spec.command or fallback)
    if not command:
        raise InvalidArgumentError(f"image {spec.image!r} names no command; give one")
    return command


def _stop_signal(spec: BoxSpec, image: ImageInfo) -> int:
    if spec.stop_signal is not None:
        return signal_number(spec.stop_signal)
    try:
        return signal_number(image.stop_signal) if image.stop_signal else int(signal.SIGTERM)
    except InvalidArgumentError:
        return int(signal.SIGTERM)


def _check_range(what: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    check_whole(what, value, low, high)


def _check_types(spec: BoxSpec) -> None:
    """What is recorded must be readable again: one record with a wrong type would spoil the whole home."""
    try:
        plain = msgspec.to_builtins(spec, builtin_types=(bytes, bytearray, memoryview))
        msgspec.json.encode(msgspec.convert(plain, BoxSpec))
    except (TypeError, ValueError, OverflowError) as error:  # a ValidationError is a ValueError
        raise InvalidArgumentError(f"the specification of the box is not valid: {error}") from None


def check_network(network: NetPolicy) -> None:
    """Raise `InvalidArgumentError` for what cannot be."""
    Policy(network.outbound, network.allow)
    if network.allow and network.outbound is Outbound.DISABLED:
        raise InvalidArgumentError("a network that is disabled has no rules; leave them out, or leave disabled out")
    for what, rate in (("send_rate", network.send_rate), ("receive_rate", network.receive_rate)):
        if rate is not None:
            check_whole(f"{what} (bytes per second)", rate, MIN_RATE, MAX_RATE)
    for published in network.ports:
        check_whole("the port of the box", published.port, 1, 65535)
        check_whole("the port of the host", published.host_port, 0, 65535)
        if published.protocol not in ("tcp", "udp"):
            raise InvalidArgumentError(f"{quoted(published.protocol)} is not the protocol of a port: tcp or udp")
        try:
            if published.host_ip:
                ipaddress.ip_address(published.host_ip)
        except ValueError:
            raise InvalidArgumentError(f"{quoted(published.host_ip)} is not an address of the host") from None


def _check_secrets(secrets: tuple[Secret, ...]) -> None:
    for secret in secrets:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", secret.name):
            raise InvalidArgumentError(f"{quoted(secret.name)} is not a name for a secret: letters, digits and '_'")
        if not secret.value or not secret.value.isprintable():  # it goes into a line of a header
            raise InvalidArgumentError(f"the value of secret {secret.name} is empty or has control characters")
        if secret.placeholder and not re.fullmatch(r"[!-~]{8,256}", secret.placeholder):
            raise InvalidArgumentError(
                f"the placeholder of secret {secret.name} must be 8 to 256 letters, digits and signs of ASCII"
            )
        if not secret.hosts:
            raise InvalidArgumentError(f"secret {secret.name} names no host; it would be of no use")
        for host in secret.hosts:
            if parse_rule(host).network is not None:
                raise InvalidArgumentError(f"secret {secret.name} is for {quoted(host)}, which is not a name")
    if len({secret.name for secret in secrets}) != len(secrets):
        raise InvalidArgumentError("two secrets have the same name")
    if len({placeholder(secret) for secret in secrets}) != len(secrets):
        raise InvalidArgumentError("two secrets have the same placeholder")


def _check_mount(mount: Mount) -> None:
    parts = mount.target.split("/")
    if not mount.target.startswith("/") or mount.target == "/" or "\0" in mount.target or ".." in parts:
        raise InvalidArgumentError(f"mount target {quoted(mount.target)} must be an absolute path below /")
    if bool(mount.source) == bool(mount.volume):
        raise InvalidArgumentError(f"the mount at {quoted(mount.target)} needs either a host path or a volume")
    if mount.volume:
        ids.check_volume_name(mount.volume)
    elif not mount.source.startswith("/") or "\0" in mount.source:
        raise InvalidArgumentError(f"mount source {quoted(mount.source)} must be an absolute host path")
    elif not _exists(mount.source):
        raise InvalidArgumentError(f"mount source {quoted(mount.source)} does not exist on the host")


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long, or not ours to see
        return False
