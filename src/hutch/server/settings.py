"""How a server is set up."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from hutch.core.policy import Policy
from hutch.errors import ConfigError, InvalidArgumentError
from hutch.runtime.bounds import check_bounds
from hutch.types import NetBounds, NetPolicy, Outbound


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times are seconds, sizes bytes.

    ``state`` is the folder of the server's own records (in the file ``database``, if that is given) and of files in
    transit. Without any key everybody who can reach the server may do everything, which is why it then answers only
    requests that name this machine. ``auto_stop`` and ``auto_delete`` are what a box gets that does not say.
    ``isolations`` are the kinds that clients may choose; the first one is for those that do not. ``header_seconds``
    and ``body_seconds`` are what the head and the body of a request may take, ``stall_seconds`` is how long an archive
    that is sent may come to a halt.

    ``network`` is the most that boxes of clients may reach: with an allow-list no rule may go beyond it, else its rules
    are what clients may name of the machine itself. ``network_by_default``: whether those that express no wish get
    that. ``bounds`` is what boxes get of the network of the machine that they are on. ``tunnel_url`` is the URL below
    whose host each tunnel has a name of its own; they are served at ``tunnel_host`` and ``tunnel_port``. Without it
    each has a port.
    """

    state: Path
    database: Path | None = None
    api_keys: tuple[str, ...] = ()
    read_only_keys: tuple[str, ...] = ()
    path_prefix: str = ""
    auto_stop: int = 900
    auto_delete: int = 0
    isolations: tuple[str, ...] = ("auto", "container", "vm")
    network: NetPolicy = NetPolicy(outbound=Outbound.ENABLED)
    network_by_default: bool = True
    bounds: NetBounds = NetBounds()
    tunnel_url: str = ""
    tunnel_host: str = "127.0.0.1"
    tunnel_port: int = 0
    exec_timeout: float | None = None
    max_exec_timeout: float | None = None
    max_json_bytes: int = 1 << 20
    max_transfer_bytes: int = 64 << 30
    max_frame_bytes: int = 128 << 20
    max_header_bytes: int = 64 << 10
    max_connections: int = 4096
    header_seconds: float = 20.0
    body_seconds: float = 30.0
    stall_seconds: float = 300.0
    heartbeat_seconds: float = 15.0
    silence_seconds: float = 30.0
    keep_alive_seconds: int = 130
    shutdown_seconds: int = 5
    owed_seconds: float = 30.0
    keep_finished_seconds: float = 300.0
    sweep_seconds: float = 5.0
    idempotency_seconds: float = 24 * 3600.0
    cpus: int = min(os.cpu_count() or 1, 255)
    memory_mib: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20

    def __post_init__(self) -> None:
        for key in (*self.api_keys, *self.read_only_keys):
            if not key or not key.isprintable() or " " in key:
                raise ConfigError("an API key must consist of printable characters without spaces")
        if set(self.api_keys) & set(self.read_only_keys):
            raise ConfigError("one key cannot be given both all rights and the right to read only")
        if self.read_only_keys and not self.api_keys:
            raise ConfigError("a key with the right to read only needs one with all rights beside it")
        if not self.isolations:
            raise ConfigError("no kind of isolation is left for clients to choose")
        try:
            Policy(self.network.outbound, self.network.allow)
            check_bounds(self.bounds)
        except InvalidArgumentError as error:
            raise ConfigError(f"the network of boxes: {error}") from None
        if self.tunnel_url and not re.fullmatch(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?/?", self.tunnel_url):
            raise ConfigError(
                f"{self.tunnel_url!r} is no URL for tunnels; it has the form https://HOST or http://HOST:PORT"
            )
        for what, seconds in (("auto_stop", self.auto_stop), ("auto_delete", self.auto_delete)):
            if seconds != 0 and seconds < 60:
                raise ConfigError(f"{what} must be 0 (never) or at least 60 seconds, not {seconds}")

    @property
    def open(self) -> bool:
        """Whether no key is asked for."""
        return not self.api_keys
