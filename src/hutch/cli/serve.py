"""serve, serve api, serve runner: boxes over HTTP."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hutch.cli import options, output
from hutch.cli.network import network_policy
from hutch.cli.parser import UsageError
from hutch.errors import ConfigError
from hutch.types import NetBounds, Outbound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hutch.cli.parser import Arguments
    from hutch.cli.session import Session
    from hutch.server.serve import Server
    from hutch.server.settings import ServerSettings
    from hutch.types import NetPolicy


async def serve(session: Session, args: Arguments) -> int:
    """Serve this machine's boxes until a signal comes; 0 after an orderly end."""
    keys = _keys(args)
    with _packages():
        from hutch.server.serve import serve_home
    database = Path(args.database).absolute() if args.database else None
    settings = _settings(args, keys, state=session.folder / "server", database=database, bounds=_bounds(args))
    with contextlib.ExitStack() as stack:
        await serve_home(session.folder, settings, args.host, args.port, _starter(session, stack, "Hutch", settings))
    return 0


async def api(session: Session, args: Arguments) -> int:
    """Serve the boxes of runners."""
    keys, token = _keys(args), _token(args)
    with _packages():
        from hutch.fleet.serve import serve_api
    database = Path(args.database).absolute() if args.database else session.folder / "fleet.db"
    database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings = _settings(args, keys, state=database.with_name(database.name + ".d"))
    with contextlib.ExitStack() as stack:
        started = _starter(session, stack, "Hutch API", settings)
        await serve_api(database, settings, join_token=token, host=args.host, port=args.port, started=started)
    return 0


async def runner(session: Session, args: Arguments) -> int:
    """Hold boxes for an API."""
    token = _token(args)
    if not args.join:
        raise UsageError("--join: name the API that the boxes are for")
    with _packages():
        from hutch.fleet.serve import serve_runner
        from hutch.server.settings import ServerSettings
    settings = ServerSettings(state=session.folder / "server", shutdown_seconds=args.shutdown, bounds=_bounds(args))
    with contextlib.ExitStack() as stack:
        await serve_runner(
            session.folder,
            settings,
            join=args.join,
            token=token,
            host=args.host,
            port=args.port,
            public_url=args.public_url,
            started=_starter(session, stack, "Hutch runner"),
        )
    return 0


def _starter(session: Session, stack: contextlib.ExitStack, what: str, settings: ServerSettings | None = None) -> Any:
    """What happens once the server listens: signals stop it, and its address is told."""

    def started(server: Server, url: str) -> None:
        stack.enter_context(session.on_signal(lambda signum: server.stop()))
        sys.stdout.write(f"{what} serves on {url}\n")
        sys.stdout.flush()
        if settings is not None and settings.open:
            output.note("Without a key: only this machine can connect. Set one with --api-key or HUTCH_API_KEY.")

    return started


def _keys(args: Arguments) -> dict[str, tuple[str, ...]]:
    """The keys, of the options and of the environment. Without any only this machine may be served."""
    full = tuple(filter(None, args.api_key or [os.environ.get("HUTCH_API_KEY")]))
    reading = tuple(filter(None, args.read_only_key or [os.environ.get("HUTCH_READ_ONLY_KEY")]))
    if not full and not options.this_machine(args.host):
        raise UsageError(
            f"--host {args.host}: without a key the server is open to all who can reach it, so it listens on this "
            "machine only; give a key with --api-key or HUTCH_API_KEY"
        )
    return {"api_keys": full, "read_only_keys": reading}


def _token(args: Arguments) -> str:
    token = args.token or os.environ.get("HUTCH_JOIN_TOKEN")
    if not token:
        raise UsageError("--token: give the token that runners join with, here or as HUTCH_JOIN_TOKEN")
    return str(token)


def _settings(args: Arguments, keys: dict[str, tuple[str, ...]], **more: Any) -> ServerSettings:
    from hutch.server.settings import ServerSettings

    chosen: dict[str, Any] = {"isolations": tuple(args.isolation)} if args.isolation else {}
    return ServerSettings(
        **more,
        **keys,  # type: ignore[arg-type]
        path_prefix=args.path_prefix or "",
        auto_stop=args.auto_stop,
        auto_delete=args.auto_delete,
        network=_network(args),
        network_by_default=not args.no_default_network,
        tunnel_url=args.tunnel_url or "",
        tunnel_host=args.host,
        tunnel_port=_tunnel_port(args),
        exec_timeout=args.exec_timeout,
        max_exec_timeout=args.max_exec_timeout,
        max_connections=args.max_connections,
        max_transfer_bytes=args.max_transfer << 30,
        shutdown_seconds=args.shutdown,
        **chosen,
    )


def _network(args: Arguments) -> NetPolicy:
    """The most that boxes may reach: everybody, unless the options say less."""
    return network_policy(args.network or (None if args.allow_net else Outbound.ENABLED), args.allow_net)


def _bounds(args: Arguments) -> NetBounds:
    """What boxes get of the network of the machine that they are on."""
    return NetBounds(
        send_rate=args.max_send_rate or None,
        receive_rate=args.max_receive_rate or None,
        publish_address=args.publish_address or "",
        publish_ports=args.publish_ports,
        max_published=args.max_published,
    )


def _tunnel_port(args: Arguments) -> int:
    if not args.tunnel_url:
        if args.tunnel_port is not None:
            raise UsageError("--tunnel-port: has no meaning without --tunnel-url")
        return 0
    if args.tunnel_port is not None:
        return int(args.tunnel_port)
    parts = urlsplit(args.tunnel_url)
    try:
        return parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise UsageError(f"--tunnel-url: {error}") from None


@contextlib.contextmanager
def _packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"the server needs packages that are missing ({error}): pip install 'hutch[server]'"
        ) from None
