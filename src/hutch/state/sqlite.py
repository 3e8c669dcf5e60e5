"""The records of one home: boxes, snapshots, volumes, in SQLite (WAL), shared by any number of processes.

A record is one JSON document (msgspec) beside the few columns that are searched. The truth about a running box is
what the engine observes; the database follows. Calls are short (tens of microseconds) and are made from the event
loop's thread.
"""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING, TypeVar

import msgspec

from hutch.errors import AlreadyExistsError, DatabaseError, MetadataError, NotFoundError, RuntimeClosedError
from hutch.host.proc import Process
from hutch.types import BoxSpec, BoxState, NetBounds, PublishedPort

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BUSY_SECONDS = 10.0

MIGRATIONS = (
    """
    CREATE TABLE boxes (
        id TEXT PRIMARY KEY, name TEXT UNIQUE, state TEXT NOT NULL, auto_remove INTEGER NOT NULL,
        created REAL NOT NULL, record BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX boxes_to_remove ON boxes (created) WHERE auto_remove;
    CREATE INDEX boxes_by_state ON boxes (state);
    CREATE TABLE snapshots (
        id TEXT PRIMARY KEY, box TEXT NOT NULL, name TEXT NOT NULL, created REAL NOT NULL, record BLOB NOT NULL,
        UNIQUE (box, name)
    ) WITHOUT ROWID;
    CREATE TABLE volumes (
        id TEXT PRIMARY KEY, name TEXT UNIQUE NOT NULL, created REAL NOT NULL, record BLOB NOT NULL
    ) WITHOUT ROWID;
    """,
)


class BoxRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """All that is known about a box.

    ``command`` is the resolved main command (``None``: none). ``disks`` are the frozen layers of its own, topmost
    first. ``reset_upper`` says that its writable layer is to be emptied before the next use (a restore that may have
    been interrupted). ``published`` are the published ports of a running box, as they were chosen; ``bounds``
    is what the operator of a server gave it when it was made, started or changed last. ``sealed`` are the values of
    its secrets, encrypted. ``owner`` is the process whose runtime made it.
    """

    id: str
    spec: BoxSpec
    image_digest: str
    state: BoxState
    created_at: float
    updated_at: float
    command: tuple[str, ...] | None
    env: dict[str, str]
    workdir: str
    user: str
    stop_signal: int
    disks: tuple[str, ...] = ()
    reset_upper: bool = False
    owner: Process | None = None
    isolation: str = "container"
    pid: int | None = None
    started_at: float | None = None
    stopped_at: float | None = None
    exit_code: int | None = None
    reason: str | None = None
    unenforced: tuple[str, ...] = ()
    published: tuple[PublishedPort, ...] = ()
    bounds: NetBounds | None = None
    sealed: bytes = b""


class SnapshotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A saved disk: the frozen layers, topmost first, that were the box's disk at that moment."""

    id: str
    name: str
    box_id: str
    disks: tuple[str, ...]
    size: int
    created_at: float


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A managed volume."""

    id: str
    name: str
    created_at: float


R = TypeVar("R", BoxRecord, SnapshotRecord, VolumeRecord)


class Store:
    """The records of one home. One object per process; `close` is idempotent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closed = False
        with self._errors():
            self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._migrate()

    def close(self) -> None:
        """Close the database: whoever comes later is told with `RuntimeClosedError`."""
        self._closed = True
        with contextlib.suppress(sqlite3.Error):
            self._db.close()

    # Boxes.

    def add_box(self, record: BoxRecord) -> None:
        """Add a box. Raises `AlreadyExistsError` when the name is taken."""
        with self._errors():
            try:
                self._db.execute(
                    "INSERT INTO boxes VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        record.id,
                        record.spec.name,
                        record.state,
                        record.spec.auto_remove,
                        record.created_at,
                        msgspec.json.encode(record),
                    ),
                )
            except sqlite3.IntegrityError:
                raise AlreadyExistsError(
                    f"a box named {record.spec.name!r} exists already; remove it or choose another name"
                ) from None

    def save_box(self, record: BoxRecord) -> None:
        """Replace a box's record; nothing happens when the box was removed meanwhile."""
        with self._errors():
            self._db.execute(
                "UPDATE boxes SET name = ?, state = ?, record = ? WHERE id = ?",
                (record.spec.name, record.state, msgspec.json.encode(record), record.id),
            )

    def get_box(self, id: str) -> BoxRecord | None:
        """Return the record of a box."""
        return self._one("SELECT record FROM boxes WHERE id = ?", id, BoxRecord)

    def box(self, id: str) -> BoxRecord:
        """`get_box` for one that is expected. Raises `NotFoundError`."""
        record = self.get_box(id)
        if record is None:
            raise NotFoundError(f"box {id} does not exist; it may have been removed")
        return record

    def find_boxes(self, text: str) -> list[BoxRecord]:
        """Return the box of this name or id, else those whose id begins with the text."""
        exact = self._one("SELECT record FROM boxes WHERE name = ?", text, BoxRecord) or self.get_box(text)
        if exact is not None:
            return [exact]
        if not text.isalnum():
            return []
        return self._all(
            "SELECT record FROM boxes WHERE id >= ? AND id < ? ORDER BY id LIMIT 3", (text, text + "~"), BoxRecord
        )

    def has_box_named(self, name: str) -> bool:
        """Whether a box has the name."""
        with self._errors():
            return self._db.execute("SELECT 1 FROM boxes WHERE name = ?", (name,)).fetchone() is not None

    def list_boxes(self, *states: BoxState) -> list[BoxRecord]:
        """Return all boxes, or those in the given states, oldest first."""
        if not states:
            return self._all("SELECT record FROM boxes ORDER BY created", (), BoxRecord)
        marks = ",".join("?" * len(states))
        return self._all(f"SELECT record FROM boxes WHERE state IN ({marks}) ORDER BY created", states, BoxRecord)

    def list_boxes_to_remove(self) -> list[BoxRecord]:
        """Return the boxes that go at their end."""
        return self._all("SELECT record FROM boxes WHERE auto_remove ORDER BY created", (), BoxRecord)

    def remove_box(self, id: str) -> bool:
        """Delete a box's record and those of its snapshots; says whether there was one."""
        with self._errors(), self._transaction():
            self._db.execute("DELETE FROM snapshots WHERE box = ?", (id,))
            return self._db.execute("DELETE FROM boxes WHERE id = ?", (id,)).rowcount > 0

    # Snapshots.

    def add_snapshot(self, record: SnapshotRecord) -> None:
        """Add a snapshot. Raises `AlreadyExistsError`."""
        with self._errors():
            try:
                self._db.execute(
                    "INSERT INTO snapshots VALUES (?, ?, ?, ?, ?)",
                    (record.id, record.box_id, record.name, record.created_at, msgspec.json.encode(record)),
                )
            except sqlite3.IntegrityError:
                raise AlreadyExistsError(f"the box has a snapshot named {record.name!r} already") from None

    def list_snapshots(self, box: str | None = None) -> list[SnapshotRecord]:
        """Return the snapshots of one box, or of all, oldest first."""
        if box is None:
            return self._all("SELECT record FROM snapshots ORDER BY created", (), SnapshotRecord)
        return self._all("SELECT record FROM snapshots WHERE box = ? ORDER BY created", (box,), SnapshotRecord)

    def remove_snapshot(self, id: str) -> None:
        """Delete a snapshot's record."""
        with self._errors():
            self._db.execute("DELETE FROM snapshots WHERE id = ?", (id,))

    # Volumes.

    def add_volume(self, record: VolumeRecord) -> None:
        """Add a volume. Raises `AlreadyExistsError`."""
        with self._errors():
            try:
                self._db.execute(
                    "INSERT INTO volumes VALUES (?, ?, ?, ?)",
                    (record.id, record.name, record.created_at, msgspec.json.encode(record)),
                )
            except sqlite3.IntegrityError:
                raise AlreadyExistsError(f"a volume named {record.name!r} exists already") from None

    def get_volume(self, name: str) -> VolumeRecord | None:
        """Return the record of a volume."""
        return self._one("SELECT record FROM volumes WHERE name = ?", name, VolumeRecord)

    def list_volumes(self) -> list[VolumeRecord]:
        """Return all volumes, oldest first."""
        return self._all("SELECT record FROM volumes ORDER BY created", (), VolumeRecord)

    def remove_volume(self, id: str) -> None:
        """Delete a volume's record."""
        with self._errors():
            self._db.execute("DELETE FROM volumes WHERE id = ?", (id,))

    # Private methods.

    def _migrate(self) -> None:
        if self._version() == len(MIGRATIONS):
            return
        with self._transaction():
            version = self._version()
            if version > len(MIGRATIONS):
                raise DatabaseError(f"{self._path} was made by a newer version of Hutch; upgrade, or use another home")
            for number, script in enumerate(MIGRATIONS[version:], version + 1):
                for statement in script.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {number}")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if self._closed:
                raise RuntimeClosedError("the runtime is closed") from None
            raise DatabaseError(f"the database {self._path}: {error}") from error

    def _one(self, query: str, value: str, kind: type[R]) -> R | None:
        rows = self._all(query, (value,), kind)
        return rows[0] if rows else None

    def _all(self, query: str, values: tuple[str, ...], kind: type[R]) -> list[R]:
        with self._errors():
            rows = self._db.execute(query, values).fetchall()
        try:
            return [msgspec.json.decode(row[0], type=kind) for row in rows]
        except msgspec.DecodeError as error:
            raise MetadataError(f"a record in {self._path} cannot be read: {error}") from error
