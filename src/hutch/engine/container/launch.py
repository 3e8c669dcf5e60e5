"""The configuration for ``box-agent launch`` (agent/launch.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.engine.container import upper
from hutch.engine.launcher import encode, hosts_file, resolver_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hutch.engine.base import BoxPlan
    from hutch.host.mapping import Mapping


def configuration(plan: BoxPlan, mapping: Mapping, doors: Iterable[str], *, pids: int | None) -> bytes:
    """Return the launcher's configuration. ``doors``: control group files; ``pids``: a limit that no group enforces.

    Raises `InvalidArgumentError` for values that it cannot carry.
    """
    records: list[tuple[str, str]] = [
        ("hostname", plan.hostname),
        ("hosts", hosts_file(plan.hostname)),
        ("resolv", resolver_file(plan.nameserver)),
        ("stage", str(plan.directory / "run")),
        *upper.configuration(plan.directory),
        ("uid_map", mapping.uid_map),
        ("gid_map", mapping.gid_map),
        ("rootless", str(int(mapping.rootless))),
        ("all_ids", str(int(not mapping.single))),
    ]
    if pids is not None:
        records.append(("pids", str(pids)))
    for lower in plan.lowers:
        shift = not lower.owned_by_box and not mapping.rootless
        records.append(("lower_shift" if shift else "lower", str(lower.path)))
    for mount in plan.mounts:
        records.append(("bind_ro" if mount.read_only else "bind_rw", str(mount.source)))
        records.append(("target", mount.target))
    records += [("cgroup", door) for door in doors]
    return encode(records)
