"""The home directory: what lies where.

hutch.db              records
images/               the image store
registries.json       logins at registries
boxes/<id>/           one box: upper/ work/ (or disk.img) run/ main.log.0 main.log.1 exit
disks/<id>-box        frozen layers of boxes: owners on disk are those of the box
disks/<id>-image      the same, with the owners of an image (from an import)
volumes/<id>/         managed volumes
vm/                   kernels, templates and bases of disks of VMs
locks/                one lock file a box, and `disks`
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec

from hutch.core import ids
from hutch.engine.base import Lower
from hutch.errors import ConfigError, StorageError
from hutch.runtime.checks import check_path


def default_home() -> Path:
    """Return ``$HUTCH_HOME``, or ``~/.hutch``."""
    given = os.environ.get("HUTCH_HOME")
    return Path(given) if given else Path.home() / ".hutch"


def new_id() -> str:
    """Make an id that nobody has."""
    return ids.from_random(secrets.token_bytes(16))


class Home(msgspec.Struct, frozen=True):
    """The paths of one home."""

    root: Path

    @classmethod
    def open(cls, root: Path | str | None) -> Home:
        """Make the folders that are missing. Raises `InvalidArgumentError`, `ConfigError` or `StorageError`."""
        path = check_path("the home directory", root) if root is not None else default_home()
        if not path.is_absolute():
            raise ConfigError(f"the home directory {str(path)!r} must be an absolute path")
        home = cls(path)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("boxes", "disks", "images", "locks", "vm", "volumes"):
                # Ids of boxes and modes of their files are nobody else's business, but box users must be able to
                # pass.
                (path / name).mkdir(mode=0o711, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the home directory {path} cannot be made: {error.strerror}; choose another with HUTCH_HOME"
            ) from error
        return home

    @property
    def database(self) -> Path:
        """The record database."""
        return self.root / "hutch.db"

    @property
    def images(self) -> Path:
        """The image store."""
        return self.root / "images"

    @property
    def logins(self) -> Path:
        """Logins at registries, which only the owner can read."""
        return self.root / "registries.json"

    @property
    def boxes(self) -> Path:
        """The folders of all boxes."""
        return self.root / "boxes"

    @property
    def disks(self) -> Path:
        """The frozen layers."""
        return self.root / "disks"

    def box(self, box_id: str) -> Path:
        """The folder of a box."""
        return self.boxes / box_id

    def saved_memory(self, box_id: str) -> Path:
        """The memory from which a box goes on when it is started next; usually there is none."""
        return self.box(box_id) / "memory"

    def pause_mark(self, box_id: str) -> Path:
        """A file that exists while the box is to stay frozen."""
        return self.box(box_id) / "paused"

    def disk(self, name: str) -> Path:
        """A frozen layer."""
        return self.disks / name

    @property
    def locks(self) -> Path:
        """The lock files."""
        return self.root / "locks"

    @property
    def vm(self) -> Path:
        """What VMs are made from."""
        return self.root / "vm"

    def volume(self, volume_id: str) -> Path:
        """The files of a managed volume."""
        return self.root / "volumes" / volume_id

    def lock(self, name: str) -> Path:
        """A lock file."""
        return self.locks / name

    def lower(self, name: str) -> Lower:
        """A frozen layer as an engine mounts it."""
        return Lower(self.disk(name), owned_by_box=name.endswith("-box"))
