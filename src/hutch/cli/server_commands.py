"""The commands of the server, and those that choose one."""

from __future__ import annotations

from hutch.cli import options
from hutch.cli.parser import Command, Option
from hutch.cli.shared_options import JSON


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise ValueError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _ports(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not dash or not first.isdecimal() or not last.isdecimal():
        raise ValueError(f"{text!r} is not a range of ports; write e.g. 20000-29999")
    return int(first), int(last)


def _seconds(text: str) -> float:
    value = options.duration(text)
    if value > 4_000_000:
        raise ValueError(f"{text!r} is longer than 4000000 seconds")
    return value


def _listen(port: str) -> tuple[Option, ...]:
    return (
        Option("--host", "ADDRESS", "where to listen", default="127.0.0.1"),
        Option("--port", "PORT", "where to listen; 0 chooses one", _port, default=port),
    )


_SHUTDOWN = Option("--shutdown", "SECONDS", "how long an orderly end waits for clients", options.count, default="5")
_CLIENTS = (
    Option("--api-key", "KEY", "ask for this key (default $HUTCH_API_KEY, which `ps` does not show)", many=True),
    Option("--read-only-key", "KEY", "a key that may only read (default $HUTCH_READ_ONLY_KEY)", many=True),
    Option("--path-prefix", "PREFIX", "serve below /v1/PREFIX"),
    Option("--auto-stop", "SECONDS", "idle time of boxes that name none, 0 for never", options.count, default="900"),
    Option("--auto-delete", "SECONDS", "idle time until removal, 0 for never", options.count, default="0"),
    Option("--exec-timeout", "TIME", "time of commands that name none", _seconds),
    Option("--max-exec-timeout", "TIME", "the longest time that a command may ask for", _seconds),
    Option(
        "--isolation",
        "KIND",
        "what clients may choose, the first one for those that do not (default: all)",
        many=True,
        choices=("auto", "vm", "container"),
    ),
    Option(
        "--network",
        "MODE",
        "the most that boxes may reach (default: enabled, or what --allow-net names)",
        choices=("enabled", "disabled"),
    ),
    Option(
        "--allow-net",
        "RULE",
        "what the lists of boxes may name at most; with --network enabled: what they may name of this machine itself",
        many=True,
    ),
    Option("--no-default-network", "", "no network for clients that express no wish, such as boxlite's"),
    Option("--tunnel-url", "URL", "where tunnels have names of their own, e.g. https://tunnels.example"),
    Option("--tunnel-port", "PORT", "where to listen for them (default: that of --tunnel-url)", _port),
    Option("--max-connections", "N", "connections at most", options.count, default="4096"),
    Option("--max-transfer", "SIZE", "the largest archive in a request, e.g. 10g", options.disk, default="64g"),
    _SHUTDOWN,
)
_MACHINE = (
    Option("--max-send-rate", "RATE", "bytes a second that a box may send at most, e.g. 10m", options.rate),
    Option("--max-receive-rate", "RATE", "bytes a second that a box may receive at most", options.rate),
    Option("--publish-address", "ADDRESS", "where ports of boxes are published (default: none are)"),
    Option("--publish-ports", "FIRST-LAST", "the ports for that", _ports, default="20000-29999"),
    Option("--max-published", "N", "published ports of all boxes together, at most", options.count, default="64"),
)
_TOKEN = Option("--token", "TOKEN", "what runners join with (default $HUTCH_JOIN_TOKEN, which `ps` does not show)")

SERVER_COMMANDS = (
    Command(
        "serve",
        "Server",
        "Serve this machine's boxes over HTTP and WebSocket",
        "serve:serve",
        (),
        (
            *_listen("8100"),
            Option("--database", "FILE", "the server's own records (default HOME/server/server.db)", complete="file"),
            *_CLIENTS,
            *_MACHINE,
        ),
        ("HUTCH_API_KEY=… hutch serve --host 0.0.0.0",),
        notes="Without a key it listens on this machine only. Boxes go on when the server ends, and are found again. "
        "`hutch serve api` and `hutch serve runner` are the two halves of it, for several machines.",
        here=True,
    ),
    Command(
        "serve api",
        "Server",
        "Serve the boxes of runners, which join",
        "serve:api",
        (),
        (
            *_listen("8100"),
            Option("--database", "FILE", "where boxes are, and more (default HOME/fleet.db)", complete="file"),
            _TOKEN,
            *_CLIENTS,
        ),
        ("HUTCH_API_KEY=… HUTCH_JOIN_TOKEN=… hutch serve api --host 0.0.0.0",),
        notes="It holds no box itself: without a runner none can be made.",
        here=True,
    ),
    Command(
        "serve runner",
        "Server",
        "Hold boxes for an API",
        "serve:runner",
        (),
        (
            Option("--join", "URL", "the API"),
            _TOKEN,
            *_listen("8101"),
            Option("--public-url", "URL", "how the API reaches this runner, if not by --host and --port"),
            *_MACHINE,
            _SHUTDOWN,
        ),
        ("HUTCH_JOIN_TOKEN=… hutch serve runner --join https://hutch.example --host 10.0.0.2",),
        here=True,
    ),
    Command(
        "auth login",
        "Server",
        "Store a server and the key for it, which is asked for or read from standard input",
        "auth:login",
        (),
        (Option("--path-prefix", "PREFIX", "what the server's paths have after /v1/ (default: it is asked)"),),
        ("hutch auth login --url https://hutch.example", "hutch auth login --url http://localhost:8100 < key"),
        notes="From then on commands are about the boxes of that server; --local is about those of this machine.",
    ),
    Command("auth logout", "Server", "Forget a stored server and its key", "auth:logout"),
    Command("auth status", "Server", "Say which server commands go to, and why", "auth:status", (), (JSON,)),
    Command("auth whoami", "Server", "Ask the server whose key this is", "auth:whoami", (), (JSON,)),
)
