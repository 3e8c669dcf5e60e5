"""auth login, logout, status, whoami. A key is never printed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from hutch.cli import options, output, terminal
from hutch.cli.credentials import DEFAULT, Credentials, Profile
from hutch.cli.parser import UsageError
from hutch.errors import ConfigError, InvalidArgumentError

if TYPE_CHECKING:
    from hutch.cli.parser import Arguments
    from hutch.cli.session import Session
    from hutch.sdk.remote_wire import Identity


async def login(session: Session, args: Arguments) -> int:
    """Read a key, see whether the server takes it, and store both."""
    credentials, name = Credentials(session.folder), _profile(session)
    known = credentials.profiles().get(name)
    url = (session.url or os.environ.get("HUTCH_URL") or (known.url if known else "")).rstrip("/")
    if not url:
        raise UsageError("--url: name the server")
    key = await terminal.read_secret(f"API key for {url}: ")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InvalidArgumentError("what was read is no key: it has characters that no key has")
    parts = urlsplit(url)
    if parts.scheme == "http" and not options.this_machine(parts.hostname or ""):
        output.note(f"{url} is not encrypted: whoever can read the traffic can read the key.")
    identity = await _ask(Profile(url, key or None))
    prefix = identity.path_prefix if args.path_prefix is None else args.path_prefix
    credentials.save(name, Profile(url, key or None, (prefix or "").strip("/")))
    output.line(f"logged in to {url} as {identity.sub} ({_rights(identity)}), profile {name}")
    return 0


async def logout(session: Session, args: Arguments) -> int:
    """Forget a profile."""
    name = _profile(session)
    gone = Credentials(session.folder).remove(name)
    output.line(f"profile {name} is forgotten" if gone else f"profile {name} was not there")
    return 0


async def status(session: Session, args: Arguments) -> int:
    """Say where commands go; 1 when that is this machine."""
    target = session.target()
    if args.json:
        server = target and {
            "url": target.profile.url,
            "path_prefix": target.profile.path_prefix,
            "key": target.profile.api_key is not None,
            "source": target.source,
        }
        output.json_value({"server": server, "profiles": sorted(Credentials(session.folder).profiles())})
    elif target is None:
        output.line("commands are about this machine; 'hutch auth login --url URL' stores a server")
    else:
        output.line(f"server:   {target.profile.url} (from {target.source})")
        output.line(f"prefix:   {target.profile.path_prefix or '-'}")
        output.line(f"key:      {'there is one' if target.profile.api_key else 'none'}")
    return 0 if target else 1


async def whoami(session: Session, args: Arguments) -> int:
    """Ask the server."""
    target = session.target()
    if target is None:
        raise ConfigError("no server is named: give --url, or log in with 'hutch auth login --url URL'")
    identity = await _ask(target.profile)
    if args.json:
        output.json_value({"url": target.profile.url, **msgspec.structs.asdict(identity)})
    else:
        output.line(f"server:   {target.profile.url}")
        output.line(f"identity: {identity.sub} ({identity.principal_type})")
        output.line(f"rights:   {_rights(identity)}")
        output.line(f"prefix:   {identity.path_prefix or '-'}")
    return 0


async def _ask(server: Profile) -> Identity:
    from hutch import Runtime

    async with Runtime.connect(server.url, server.api_key) as runtime:
        return await runtime.whoami()


def _profile(session: Session) -> str:
    return session.profile or os.environ.get("HUTCH_PROFILE") or DEFAULT


def _rights(identity: Identity) -> str:
    return ", ".join(identity.scopes)
