"""What the API remembers: its runners, and which of them holds which box and volume."""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from hutch.errors import AlreadyExistsError, DatabaseError, InvalidArgumentError, NotFoundError
from hutch.image.logins import Entry
from hutch.runtime.checks import quoted
from hutch.types import BoxInfo

if TYPE_CHECKING:
    from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runner (id TEXT PRIMARY KEY, url TEXT NOT NULL, token TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS box (
    id TEXT PRIMARY KEY, name TEXT UNIQUE, runner TEXT NOT NULL, info TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS login (id TEXT PRIMARY KEY, entry TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS volume (name TEXT PRIMARY KEY, runner TEXT NOT NULL) STRICT;
"""


class Place(NamedTuple):
    """A box, as last seen, and its runner."""

    info: BoxInfo
    runner: str


class Registry:
    """A database file, used by one process. Raises `DatabaseError` when it cannot be used."""

    def __init__(self, path: Path) -> None:
        try:
            # It holds the runners' tokens and the passwords of registries.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; {_SCHEMA}")
        except (OSError, sqlite3.Error) as error:
            raise DatabaseError(f"the database {path} cannot be used: {error}") from None

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def runners(self) -> list[tuple[str, str, str]]:
        """All runners: (id, url, token)."""
        return self._db.execute("SELECT id, url, token FROM runner").fetchall()

    def save_runner(self, runner: str, url: str, token: str) -> None:
        """Note where a runner is."""
        self._db.execute("INSERT OR REPLACE INTO runner VALUES (?, ?, ?)", (runner, url, token))

    def save_box(self, info: BoxInfo, runner: str) -> None:
        """Note where a box is. Raises `AlreadyExistsError` when its name is that of another one."""
        row = (info.id, info.name, runner, msgspec.json.encode(info).decode())
        try:
            self._db.execute(
                "INSERT INTO box VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET info = excluded.info", row
            )
        except sqlite3.IntegrityError:
            raise AlreadyExistsError(f"a box named {info.name!r} exists already; choose another name") from None

    def remove_box(self, box_id: str) -> None:
        """Forget a box."""
        self._db.execute("DELETE FROM box WHERE id = ?", (box_id,))

    def boxes(self, runner: str | None = None) -> list[Place]:
        """All boxes, or those of one runner, oldest first."""
        rows = self._db.execute(
            "SELECT info, runner FROM box WHERE ?1 IS NULL OR runner = ?1 ORDER BY rowid", (runner,)
        )
        return [_place(row) for row in rows]

    def count(self, runner: str) -> int:
        """How many boxes a runner holds."""
        found: int = self._db.execute("SELECT count(*) FROM box WHERE runner = ?", (runner,)).fetchone()[0]
        return found

    def named(self, name: str) -> Place | None:
        """The box with a name."""
        row = self._db.execute("SELECT info, runner FROM box WHERE name = ?", (name,)).fetchone()
        return None if row is None else _place(row)

    def find(self, box: str) -> Place:
        """Find a box by name, id or unambiguous prefix of the id. Raises `NotFoundError`."""
        query = (
            "SELECT info, runner FROM box WHERE name = ?1 OR id = ?1 "
            "OR (length(?1) >= 1 AND substr(id, 1, length(?1)) = ?1) ORDER BY name IS NOT ?1, id IS NOT ?1 LIMIT 2"
        )
        rows = [_place(row) for row in self._db.execute(query, (box,))]
        if not rows:
            raise NotFoundError(f"box {quoted(box)} does not exist")
        if len(rows) > 1 and box not in (rows[0].info.name, rows[0].info.id):
            raise InvalidArgumentError(f"{quoted(box)} is the beginning of several box ids; give more of it")
        return rows[0]

    def logins(self) -> list[Entry]:
        """All logins at registries, oldest first."""
        rows = self._db.execute("SELECT entry FROM login ORDER BY rowid")
        return [msgspec.json.decode(entry, type=Entry) for (entry,) in rows]

    def save_login(self, entry: Entry) -> None:
        """Keep a login."""
        self._db.execute("INSERT INTO login VALUES (?, ?)", (entry.info.id, msgspec.json.encode(entry).decode()))

    def remove_login(self, login_id: str) -> None:
        """Forget a login."""
        self._db.execute("DELETE FROM login WHERE id = ?", (login_id,))

    def volumes(self) -> dict[str, str]:
        """All volumes: the runner of each name."""
        return dict(self._db.execute("SELECT name, runner FROM volume").fetchall())

    def save_volume(self, name: str, runner: str) -> None:
        """Note where a volume is. Raises `AlreadyExistsError`."""
        try:
            self._db.execute("INSERT INTO volume VALUES (?, ?)", (name, runner))
        except sqlite3.IntegrityError:
            raise AlreadyExistsError(f"volume {name!r} exists already") from None

    def remove_volume(self, name: str) -> None:
        """Forget a volume."""
        self._db.execute("DELETE FROM volume WHERE name = ?", (name,))


def _place(row: tuple[str, str]) -> Place:
    return Place(msgspec.json.decode(row[0], type=BoxInfo), row[1])
