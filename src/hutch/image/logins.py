"""Logins at registries that were entrusted to a home: one file, which only its owner can read."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Final

import msgspec

from hutch.core import ociref
from hutch.errors import AlreadyExistsError, ConfigError, InvalidArgumentError, NotFoundError
from hutch.host.files import atomic_write, locked
from hutch.image.config import Credential
from hutch.types import LoginInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

_LOCK_SECONDS: Final = 10.0
_LONGEST: Final = 64 << 10


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A login with its secret, which its text form does not show."""

    info: LoginInfo
    password: str

    def __repr__(self) -> str:
        return f"Entry({self.info!r}, password=…)"

    __str__ = __repr__


class Logins:
    """The file. Any number of processes may use it. Raises `ConfigError` for one that is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> list[Entry]:
        """All logins, oldest first."""
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[Entry])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            # The cause may quote the file: only its kind is told.
            raise ConfigError(f"{self._path} cannot be read: {type(error).__name__}; repair or remove it") from None

    async def add(self, entry: Entry) -> LoginInfo:
        """Add one. Raises `AlreadyExistsError`."""
        async with self._locked():
            self._write(added(self.entries(), entry))
        return entry.info

    async def remove(self, login_id: str) -> None:
        """Remove one. Raises `NotFoundError`."""
        async with self._locked():
            self._write(removed(self.entries(), login_id))

    async def replace(self, entries: Iterable[Entry]) -> None:
        """Replace all."""
        async with self._locked():
            self._write(entries)

    def find(self, host: str, repository: str) -> Credential | None:
        """Return the login for a repository at ``host[:port]``: that with the longest prefix of its path."""
        fitting = [
            entry for entry in self.entries() if entry.info.registry == host and _within(repository, entry.info.prefix)
        ]
        if not fitting:
            return None
        best = max(fitting, key=lambda entry: len(entry.info.prefix))
        return Credential(best.info.username, best.password)

    def _locked(self) -> AbstractAsyncContextManager[None]:
        return locked(self._path.with_name(f"{self._path.name}.lock"), timeout=_LOCK_SECONDS)

    def _write(self, entries: Iterable[Entry]) -> None:
        atomic_write(self._path, msgspec.json.encode(list(entries)), durable=True)


def make(registry: str, username: str, password: str, prefix: str = "") -> Entry:
    """Return a new login, checked. Raises `InvalidArgumentError`, which does not quote the secret."""
    prefix = prefix.strip("/")
    for what, text in (("username", username), ("password", password)):
        if not text or len(text) > _LONGEST or not text.isprintable():
            raise InvalidArgumentError(f"{what}: it must be printable text of 1 to {_LONGEST} characters")
    if ":" in username:  # RFC 7617
        raise InvalidArgumentError("username: it cannot have a colon")
    registry = ociref.DEFAULT_DOMAIN if registry == "index.docker.io" else registry
    try:
        known = ociref.parse(f"{registry}/{prefix}/x" if prefix else f"{registry}/x").domain == registry
    except InvalidArgumentError:
        known = False
    if not known:
        raise InvalidArgumentError(
            f"registry: {registry!r:.300} with the prefix {prefix!r:.300} is not a registry's host[:port] and a path"
        )
    info = LoginInfo(id=str(uuid.uuid4()), registry=registry, prefix=prefix, username=username, created_at=time.time())
    return Entry(info=info, password=password)


def added(entries: Sequence[Entry], entry: Entry) -> list[Entry]:
    """The logins with one more. Raises `AlreadyExistsError`."""
    for other in entries:
        if (other.info.registry, other.info.prefix) == (entry.info.registry, entry.info.prefix):
            where = "/".join(filter(None, (entry.info.registry, entry.info.prefix)))
            raise AlreadyExistsError(f"there is a login for {where} already ({other.info.id}); remove it first")
    return [*entries, entry]


def removed(entries: Sequence[Entry], login_id: str) -> list[Entry]:
    """The logins without one. Raises `NotFoundError`."""
    left = [entry for entry in entries if entry.info.id != login_id]
    if len(left) == len(entries):
        raise NotFoundError(f"registry login {login_id!r:.100} does not exist")
    return left


def _within(repository: str, prefix: str) -> bool:
    return not prefix or repository == prefix or repository.startswith(f"{prefix}/")
