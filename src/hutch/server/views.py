"""From the types of Hutch to the bodies of responses."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hutch.core import ociref
from hutch.errors import InvalidArgumentError
from hutch.server import policy
from hutch.server.models import (
    AliasView,
    BoxView,
    ImageDetail,
    ImageRow,
    ImageVersion,
    NetworkState,
    NetworkView,
    PortView,
    RegistryView,
    SnapshotView,
    VolumeView,
)
from hutch.types import Outbound

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from hutch.server.aliases import AliasChange
    from hutch.server.service import Service
    from hutch.types import BoxInfo, ImageInfo, LoginInfo, NetPolicy, PublishedPort, SnapshotInfo, VolumeInfo


# The end of the year 9999.
_LAST = 253_402_300_799.0


def moment(seconds: float) -> str:
    """RFC 3339, in UTC. A time that an image claims may be any number."""
    time = datetime.fromtimestamp(min(max(seconds, 0.0), _LAST), UTC)
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")


def maybe_moment(seconds: float | None) -> str | None:
    """`moment`, where there is one."""
    return None if seconds is None else moment(seconds)


def box(service: Service, info: BoxInfo) -> BoxView:
    """A box."""
    rules = policy.from_labels(info.labels)
    mark = service.marks.get(info.id)
    has_policy = any(key.startswith(policy.RESERVED) for key in info.labels)
    return BoxView(
        box_id=info.id,
        name=info.name,
        status=info.state.value,
        created_at=moment(info.created_at),
        updated_at=moment(info.updated_at),
        image=info.image,
        cpus=info.limits.cpus or service.settings.cpus,
        memory_mib=info.limits.memory_mib or service.settings.memory_mib,
        disk_size_gb=info.limits.disk_gb,
        pid=info.pid,
        labels=policy.public(info.labels),
        auto_stop=rules.auto_stop,
        auto_delete=rules.auto_delete,
        auto_resume=rules.auto_resume if has_policy else info.auto_resume,
        last_activity_at=moment(mark.at) if mark else None,
        started_at=maybe_moment(info.started_at),
        exit_code=info.exit_code,
        reason=info.reason,
        isolation=info.isolation.value,
        unenforced=list(info.unenforced),
        network=network(info.network, is_open=service.marks.is_open(info.id)),
    )


def network(policy: NetPolicy, *, is_open: bool) -> NetworkView:
    """The network of a box. An empty list means everybody there, so a list without rules is told as what it is."""
    listed = policy.allow if policy.outbound is Outbound.ALLOW_LIST else ()
    reaches = policy.outbound is Outbound.ENABLED or bool(listed)
    return NetworkView(
        outbound=NetworkState(mode="enabled" if reaches else "disabled", allow_net=list(listed)),
        inbound=NetworkState(mode="enabled" if is_open else "disabled"),
        published_ports=[
            PortView(guest_port=port.port, host_ip=port.host_ip, host_port=port.host_port, protocol=_protocol(port))
            for port in policy.ports
        ],
        send_rate=policy.send_rate,
        receive_rate=policy.receive_rate,
    )


def _protocol(port: PublishedPort) -> Literal["tcp", "udp"]:
    return "udp" if port.protocol == "udp" else "tcp"


def snapshot(info: SnapshotInfo) -> SnapshotView:
    """A snapshot."""
    return SnapshotView(
        id=info.id,
        box_id=info.box_id,
        name=info.name,
        created_at=int(info.created_at),
        container_disk_bytes=info.size,
        size_bytes=info.size,
    )


def volume(info: VolumeInfo) -> VolumeView:
    """A volume; its size is not measured."""
    return VolumeView(id=info.id, name=info.name, created_at=moment(info.created_at), size_bytes=info.size or None)


def split_reference(reference: str) -> tuple[str, str]:
    """The repository and the tag of a reference."""
    head, colon, tag = reference.partition("@")[0].rpartition(":")
    return (head, tag) if colon and "/" not in tag else (reference.partition("@")[0], "latest")


def repository_of(reference: str) -> str:
    """The full name of a reference without its tag."""
    try:
        parsed = ociref.parse(reference)
    except InvalidArgumentError:  # a digest
        return reference
    return f"{parsed.domain}/{parsed.path}"


def image_rows(info: ImageInfo) -> list[ImageRow]:
    """The names of an image; its digest, where it has none."""
    rows = []
    for reference in info.references or (info.digest,):
        repository, tag = split_reference(reference) if info.references else ("<none>", "<none>")
        rows.append(
            ImageRow(
                reference=reference,
                repository=repository,
                tag=tag,
                id=info.digest,
                cached_at=moment(info.created_at),
                size_bytes=info.size,
            )
        )
    return rows


def image(name: str, infos: Sequence[ImageInfo], history: Sequence[AliasChange], *, repository: str) -> ImageDetail:
    """An image in detail: all the states that are here, and their tags in the repository."""
    versions = [
        ImageVersion(
            digest=info.digest,
            source_ref=info.references[0] if info.references else info.digest,
            recorded_at=moment(info.created_at),
            aliases=[split_reference(text)[1] for text in info.references if repository_of(text) == repository],
            size_bytes=info.size,
        )
        for info in infos
    ]
    changes = [
        AliasView(
            alias=change.alias,
            from_digest=change.from_digest,
            to_digest=change.to_digest,
            recorded_at=moment(change.at),
            actor=change.actor,
        )
        for change in history
    ]
    aliases = [alias for version in versions for alias in version.aliases]
    return ImageDetail(name=name, aliases=aliases, versions=versions, history=changes)


def registry(info: LoginInfo) -> RegistryView:
    """A login at a registry."""
    return RegistryView(
        id=info.id,
        registry_host=info.registry,
        repository_prefix=info.prefix,
        username=info.username,
        created_at=moment(info.created_at),
    )
