"""The commands of the server."""

from __future__ import annotations

from hutch.cli.parser import Command, Option


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise ValueError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 4_000_000:
        raise ValueError(f"{text!r} is not a number of seconds")
    return value


SERVER_COMMANDS = (
    Command(
        "serve",
        "System",
        "Serve this machine's boxes over HTTP and WebSocket",
        "serve:serve",
        (),
        (
            Option("--host", "ADDRESS", "where to listen", default="127.0.0.1"),
            Option("--port", "PORT", "where to listen; 0 chooses one", _port, default="8100"),
            Option("--api-key", "KEY", "ask for this key (default $HUTCH_API_KEY)", many=True),
            Option("--read-only-key", "KEY", "a key that may only read", many=True),
            Option("--path-prefix", "PREFIX", "serve below /v1/PREFIX", default=""),
            Option("--auto-stop", "SECONDS", "idle time of boxes that name none, 0 for never", int, default="900"),
            Option("--auto-delete", "SECONDS", "idle time until removal, 0 for never", int, default="0"),
            Option("--exec-timeout", "SECONDS", "time of commands that name none", _seconds),
            Option("--max-exec-timeout", "SECONDS", "the longest time that a command may ask for", _seconds),
        ),
        ("HUTCH_API_KEY=… hutch serve --host 0.0.0.0",),
        notes="Without a key it listens on this machine only. Boxes go on when the server ends, and are found again.",
    ),
)
