"""The history of image aliases: which image each one meant, since when, and who said so."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

import msgspec

from hutch.errors import DatabaseError

# So many changes of one name are told, the latest ones.
_MOST = 1000


class AliasChange(msgspec.Struct, frozen=True):
    """An alias was given to an image, and may have been taken from another one. ``at`` in Unix seconds."""

    alias: str
    from_digest: str | None
    to_digest: str
    at: float
    actor: str


class AliasLog:
    """A table of the server's records. Raises `DatabaseError`."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._execute(
            "CREATE TABLE IF NOT EXISTS alias_changes (id INTEGER PRIMARY KEY, repository TEXT NOT NULL,"
            " alias TEXT NOT NULL, from_digest TEXT, to_digest TEXT NOT NULL, at REAL NOT NULL, actor TEXT NOT NULL)"
        )
        self._execute("CREATE INDEX IF NOT EXISTS alias_repository ON alias_changes (repository)")

    def add(self, repository: str, alias: str, from_digest: str | None, to_digest: str, actor: str) -> None:
        """Note a change."""
        self._execute(
            "INSERT INTO alias_changes (repository, alias, from_digest, to_digest, at, actor)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (repository, alias, from_digest, to_digest, time.time(), actor),
        )

    def of(self, repository: str) -> list[AliasChange]:
        """The changes of one repository, the latest first."""
        rows = self._execute(
            "SELECT alias, from_digest, to_digest, at, actor FROM alias_changes WHERE repository = ?"
            " ORDER BY id DESC LIMIT ?",
            (repository, _MOST),
        )
        return [AliasChange(*row) for row in rows]

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise DatabaseError(f"the server's records cannot be used: {error}") from error
