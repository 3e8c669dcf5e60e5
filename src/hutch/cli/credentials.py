"""Which server the tool speaks to, and with which key: the options, the environment, the file of profiles.

``$HUTCH_HOME/credentials.toml`` (mode 0600) has a table for each profile::

    [profiles.default]
    url = "https://hutch.example"
    api_key = "…"
    path_prefix = "team-1"
"""

from __future__ import annotations

import json
import os
import stat
from typing import TYPE_CHECKING

import msgspec

from hutch.core import ids
from hutch.errors import ConfigError, NotFoundError, StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DEFAULT = "default"
_FILE = "credentials.toml"


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server and the key for it (none for a server that asks for none)."""

    url: str
    api_key: str | None = None
    path_prefix: str = ""

    def __repr__(self) -> str:
        return f"<profile for {self.url}>"


class _File(msgspec.Struct, forbid_unknown_fields=True):
    profiles: dict[str, Profile] = {}


class Target(msgspec.Struct, frozen=True):
    """What was chosen. ``source`` says where the address comes from."""

    profile: Profile
    source: str


class Credentials:
    """The file of profiles below a home. Raises `ConfigError` for one that is not understood or that others may read:
    it is never overwritten then."""

    def __init__(self, home: Path) -> None:
        self.path = home / _FILE

    def profiles(self) -> dict[str, Profile]:
        """All profiles by name; none when there is no file."""
        try:
            with self.path.open("rb") as file:
                import tomllib  # only who has a file pays for it

                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if mode & 0o077:
                    raise ConfigError(f"{self.path} can be read by others: chmod 600 it, and renew the keys in it")
                return msgspec.convert(tomllib.load(file), _File).profiles
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:  # what tomllib and msgspec raise are ValueErrors
            raise ConfigError(f"{self.path} is not understood ({error}); mend it or remove it") from None
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror}") from None

    def save(self, name: str, profile: Profile) -> None:
        """Add or replace a profile."""
        self._write({**self.profiles(), ids.check_name(name, "profile"): profile})

    def remove(self, name: str) -> bool:
        """Remove a profile, and the file with its last one; false when there was none."""
        profiles = self.profiles()
        if profiles.pop(name, None) is None:
            return False
        self._write(profiles)
        return True

    def _write(self, profiles: Mapping[str, Profile]) -> None:
        from hutch.host.files import atomic_write

        try:
            if not profiles:
                self.path.unlink()
                return
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be changed: {error.strerror}") from None
        atomic_write(self.path, "\n".join(map(_table, profiles, profiles.values())).encode(), durable=True)


def choose(home: Path, *, url: str | None, profile: str | None, local: bool) -> Target | None:
    """Find the server; ``None`` stands for this machine. An option goes before the environment, that before the file.

    A stored key goes to the server that it was stored for; to another address only if its profile was named. Raises
    `NotFoundError` for a profile that does not exist, and what `Credentials` raises.
    """
    env = os.environ
    if local:
        return None
    named = profile or (None if url else env.get("HUTCH_PROFILE"))
    address = url or (None if profile else env.get("HUTCH_URL"))
    source = "--url" if url else "HUTCH_URL"
    profiles = Credentials(home).profiles()
    if named and named not in profiles:
        raise NotFoundError(f"profile {named!r} does not exist; log in with 'hutch auth login --profile {named}'")
    stored = profiles.get(named or DEFAULT)
    if address is None:
        if stored is None:
            return None
        address, source = stored.url, f"profile {named or DEFAULT}"
    elif not named:
        stored = next((known for known in profiles.values() if _same(known.url, address)), None)
    prefix = env.get("HUTCH_PATH_PREFIX")
    return Target(
        Profile(
            url=address.rstrip("/"),
            api_key=env.get("HUTCH_API_KEY") or (stored.api_key if stored else None),
            path_prefix=prefix if prefix is not None else stored.path_prefix if stored else "",
        ),
        source,
    )


def _same(one: str, other: str) -> bool:
    return one.rstrip("/") == other.rstrip("/")


def _table(name: str, profile: Profile) -> str:
    fields = msgspec.structs.asdict(profile)
    lines = [f"{field} = {_text(value)}\n" for field, value in fields.items() if value]
    return f"[profiles.{_text(name)}]\n{''.join(lines)}"


def _text(value: str) -> str:
    # A JSON string of printable characters is a TOML string.
    return json.dumps(value, ensure_ascii=False)
