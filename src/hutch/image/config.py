"""How images are fetched: mirrors, plain http, credentials, limits."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import socket
from pathlib import Path

import msgspec

from hutch.errors import ConfigError


class Credential(msgspec.Struct, frozen=True):
    """A user and a password (or token). Its text form never shows the secret."""

    username: str
    password: str

    def __repr__(self) -> str:
        return f"Credential(username={self.username!r}, password=…)"

    __str__ = __repr__

    @property
    def basic(self) -> str:
        """The value of an ``Authorization`` header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class RegistryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of registries.

    ``mirrors`` maps a registry's domain to addresses (``[http[s]://]host[:port][/prefix]``) that are tried in order
    before the registry itself. ``insecure`` are the ``host[:port]`` that may be spoken to in plain http; loopback
    addresses always may. ``credentials`` maps ``host[:port]`` (``docker.io`` for Docker Hub) to a login; what is not
    there is looked up in the file ``logins`` (`hutch.image.logins`), and then in ``docker_config``. Times are
    seconds, sizes bytes; the sizes bound one layer.
    """

    mirrors: dict[str, list[str]] = {}
    insecure: frozenset[str] = frozenset()
    credentials: dict[str, Credential] = {}
    logins: Path | None = None
    docker_config: Path | None = Path("~/.docker/config.json")
    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    retries: int = 5
    parallel_layers: int = 3
    max_layer_bytes: int = 20 << 30
    max_layer_entries: int = 2_000_000

    def credential(self, host: str, repository: str = "") -> Credential | None:
        """Return the login for a repository at ``host[:port]``; ``None`` means anonymous.

        Raises `ConfigError` for a file of logins that cannot be understood.
        """
        if host in self.credentials:
            return self.credentials[host]
        if self.logins is not None:
            from hutch.image.logins import Logins

            if (found := Logins(self.logins).find(host, repository)) is not None:
                return found
        return _docker_login(self.docker_config.expanduser(), host) if self.docker_config else None

    def plain_http(self, host: str) -> bool:
        """Whether plain http is allowed to ``host[:port]``."""
        return is_loopback(host) or host in self.insecure


def is_loopback(host: str) -> bool:
    """Whether ``host[:port]`` is this machine by its literal address, in any spelling, or by the name ``localhost``."""
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # "127.1", "0x7f000001"
        except (OSError, UnicodeError):
            name = host.lower().rstrip(".")
            return name == "localhost" or name.endswith(".localhost")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback or (mapped or address).is_unspecified


class _Auth(msgspec.Struct):
    auth: str = ""
    username: str = ""
    password: str = ""


class _DockerConfig(msgspec.Struct):
    auths: dict[str, _Auth] = {}


def _docker_login(path: Path, host: str) -> Credential | None:
    """Look a host up in ``auths`` of Docker's config file (``docker login`` without a credential helper)."""
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_DockerConfig)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # The cause may quote the file: only its kind is told.
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}; repair or remove it") from None
    names = (host, "https://index.docker.io/v1/", "index.docker.io") if host == "docker.io" else (host,)
    for key, entry in config.auths.items():
        if key in names or key.removeprefix("https://").removeprefix("http://").split("/")[0] in names:
            return _login(entry, path, key)
    return None


def _login(entry: _Auth, path: Path, key: str) -> Credential | None:
    if entry.username:
        return Credential(entry.username, entry.password)
    if not entry.auth:
        return None
    try:
        username, colon, password = base64.b64decode(entry.auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        colon = ""
    if not colon:
        raise ConfigError(f"{path}: the login of {key!r} is malformed; log in again")
    return Credential(username, password)
