"""What an engine is told to start: a box's record, with the places of all that it names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hutch.core.policy import GATEWAY_ADDRESS
from hutch.engine.base import BoxPlan, Lower, MountPlan
from hutch.errors import NotFoundError
from hutch.runtime.records import title

if TYPE_CHECKING:
    from hutch.image import ImageStore
    from hutch.runtime.home import Home
    from hutch.state import BoxRecord, Store
    from hutch.types import Mount


def plan(record: BoxRecord, home: Home, store: Store, images: ImageStore) -> BoxPlan:
    """Return the plan of a box. Raises `NotFoundError` for an image or a volume that is gone."""
    image_layers: tuple[Lower, ...] = ()
    if record.image_digest:
        image = images.get(record.image_digest)
        image_layers = tuple(Lower(path) for path in images.layer_paths(image))
    return BoxPlan(
        box_id=record.id,
        directory=home.box(record.id),
        lowers=tuple(home.lower(name) for name in record.disks) + image_layers,
        hostname=record.spec.hostname or record.spec.name or record.id,
        nameserver=GATEWAY_ADDRESS,
        limits=record.spec.limits,
        mounts=tuple(_mount(record, mount, home, store) for mount in record.spec.mounts),
        saved=saved if (saved := home.saved_memory(record.id)).exists() else None,
    )


def _mount(record: BoxRecord, mount: Mount, home: Home, store: Store) -> MountPlan:
    if mount.volume:
        volume = store.get_volume(mount.volume)
        if volume is None:
            raise NotFoundError(f"volume {mount.volume!r} of box {title(record)} does not exist any more")
        source = home.volume(volume.id)
    else:
        source = Path(mount.source)
    return MountPlan(source=source, target=mount.target, read_only=mount.read_only)
