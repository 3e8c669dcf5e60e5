"""What the server itself must remember over a restart: the activity of boxes, and beside it the history of aliases."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from typing import TYPE_CHECKING

import msgspec

from hutch.errors import ConfigError, DatabaseError
from hutch.server.aliases import AliasLog
from hutch.server.transit import Transit

if TYPE_CHECKING:
    from pathlib import Path

_BUSY_SECONDS = 10.0


class Mark(msgspec.Struct, gc=False):
    """The last use of a box (Unix seconds), and whether it was the idle policy that stopped it."""

    at: float
    idle_stopped: bool = False


class Marks:
    """The marks of all boxes, in memory and, with `flush`, on disk (readable by the owner only). One server at a time
    has them. Raises `ConfigError` or `DatabaseError`."""

    def __init__(self, folder: Path, database: Path | None = None) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Transit(folder).clear()
            path = database or folder / "server.db"
            path.touch(mode=0o600)
            os.chmod(path, 0o600)
            self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS marks"
                " (box TEXT PRIMARY KEY, at REAL NOT NULL, idle_stopped INTEGER NOT NULL) WITHOUT ROWID"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS open (box TEXT PRIMARY KEY) WITHOUT ROWID")
            self._open = {box for (box,) in self._db.execute("SELECT box FROM open")}
            rows = self._db.execute("SELECT box, at, idle_stopped FROM marks").fetchall()
        except BlockingIOError:
            raise ConfigError(f"another server uses {folder.parent} already; stop it, or choose another home") from None
        except (OSError, sqlite3.Error) as error:
            raise DatabaseError(f"the server's records in {folder} cannot be opened: {error}") from error
        self.aliases = AliasLog(self._db)
        self._marks = {box: Mark(at, bool(stopped)) for box, at, stopped in rows}
        self._changed: set[str] = set()

    def get(self, box: str) -> Mark | None:
        """The mark of a box, if it has one."""
        return self._marks.get(box)

    def touch(self, box: str, now: float) -> None:
        """The box is used."""
        mark = self._marks.setdefault(box, Mark(now))
        mark.at = max(mark.at, now)
        self._changed.add(box)

    def set_idle_stopped(self, box: str, value: bool, now: float) -> None:
        """Remember who stopped the box; told at once to the disk."""
        self._marks.setdefault(box, Mark(now)).idle_stopped = value
        self._changed.add(box)
        self.flush()

    def forget(self, box: str) -> None:
        """The box is gone."""
        self.set_open(box, False)
        if self._marks.pop(box, None) is not None:
            self._changed.add(box)

    def is_open(self, box: str) -> bool:
        """Whether anybody may use the tunnels of the box who knows where they are."""
        return box in self._open

    def set_open(self, box: str, value: bool) -> None:
        """Remember that; told at once to the disk. Raises `DatabaseError`."""
        if value == (box in self._open):
            return
        statement = "INSERT INTO open VALUES (?)" if value else "DELETE FROM open WHERE box = ?"
        try:
            self._db.execute(statement, (box,))
        except sqlite3.Error as error:
            raise DatabaseError(f"the server's records cannot be written: {error}") from error
        (self._open.add if value else self._open.discard)(box)

    def boxes(self) -> list[str]:
        """The boxes that have a mark."""
        return list(self._marks)

    def flush(self) -> None:
        """Write what has changed. Raises `DatabaseError`."""
        changed, self._changed = self._changed, set()
        kept = [(box, mark.at, mark.idle_stopped) for box in changed if (mark := self._marks.get(box))]
        gone = [(box,) for box in changed if box not in self._marks]
        if not changed:
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", kept)
            self._db.executemany("DELETE FROM marks WHERE box = ?", gone)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._changed |= changed
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise DatabaseError(f"the server's records cannot be written: {error}") from error

    def close(self) -> None:
        """Write and close."""
        try:
            self.flush()
        finally:
            self._db.close()
            self._lock.close()
