"""serve: this machine's boxes over HTTP."""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hutch.cli.parser import UsageError
from hutch.errors import ConfigError

if TYPE_CHECKING:
    from hutch.cli.parser import Arguments
    from hutch.cli.session import Session


async def serve(session: Session, args: Arguments) -> int:
    """Serve until a signal comes; 0 after an orderly end."""
    keys = tuple(filter(None, [*args.api_key, os.environ.get("HUTCH_API_KEY", "")]))
    if not keys and not _loopback(args.host):
        raise UsageError(
            f"--host {args.host}: without a key the server is open to all who can reach it, so it listens on this "
            "machine only; give a key with --api-key or HUTCH_API_KEY"
        )
    try:
        from hutch.server.app import make_app
        from hutch.server.serve import listen, make_server
        from hutch.server.settings import ServerSettings
    except ImportError as error:
        raise ConfigError(
            f"the server needs packages that are missing ({error}): pip install 'hutch[server]'"
        ) from None
    from hutch import Runtime
    from hutch.runtime.home import default_home

    home = Path(session.home) if session.home else default_home()
    settings = ServerSettings(
        state=home / "server",
        api_keys=keys,
        read_only_keys=tuple(args.read_only_key),
        path_prefix=args.path_prefix,
        auto_stop=args.auto_stop,
        auto_delete=args.auto_delete,
        exec_timeout=args.exec_timeout,
        max_exec_timeout=args.max_exec_timeout,
    )
    with listen(args.host, args.port) as listener:
        async with Runtime.local(home) as runtime:
            server = make_server(make_app(runtime, settings), settings)
            with session.on_signal(lambda signum: server.stop()):
                _announce(listener.getsockname(), settings.open)
                await server.serve(sockets=[listener])
    return 0


def _announce(address: tuple[str, int], is_open: bool) -> None:
    host, port = address[:2]
    name = f"[{host}]" if ":" in host else host
    sys.stdout.write(f"Hutch serves on http://{name}:{port}\n")
    sys.stdout.flush()
    if is_open:
        sys.stderr.write("Without a key: only this machine can connect. Set one with --api-key or HUTCH_API_KEY.\n")


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
