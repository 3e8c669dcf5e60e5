"""Options and arguments that several commands share."""

from __future__ import annotations

from hutch.cli import options
from hutch.cli.parser import Argument, Option

# The first one is for commands that are about this machine, too.
GLOBAL = (
    Option(
        "--home",
        "DIR",
        "where boxes and images are kept (default $HUTCH_HOME or ~/.hutch)",
        complete="directory",
    ),
    Option("--url", "URL", "the boxes of this server (default $HUTCH_URL, else the profile's)"),
    Option("--profile", "NAME", "a server that `hutch auth login` has stored (default $HUTCH_PROFILE)"),
    Option("--local", "", "the boxes of this machine, whatever is stored"),
)

ALLOW_NET = Option(
    "--allow-net",
    "HOST[:PORT]",
    "let the box reach this host: a name, *.NAME, address or network; with --network enabled beyond what that allows",
    many=True,
)
RATES = (
    Option("--send-rate", "RATE", "bytes a second that the box may send, e.g. 500k, 2m, or none", parse=options.rate),
    Option("--receive-rate", "RATE", "bytes a second that the box may receive", parse=options.rate),
)
JSON = Option("--json", "", "print JSON")
QUIET = Option("-q --quiet", "", "no progress")
PLATFORM = Option("--platform", "OS/ARCH", "choose this platform of the image")
BOX = Argument("BOX", "name, id or unambiguous start of the id", complete="box")
