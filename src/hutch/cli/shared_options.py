"""Options and arguments that several commands share."""

from __future__ import annotations

from hutch.cli.parser import Argument, Option

GLOBAL = (
    Option(
        "--home",
        "DIR",
        "where boxes and images are kept (default $HUTCH_HOME or ~/.hutch)",
        complete="directory",
    ),
)

JSON = Option("--json", "", "print JSON")
QUIET = Option("-q --quiet", "", "no progress")
PLATFORM = Option("--platform", "OS/ARCH", "choose this platform of the image")
BOX = Argument("BOX", "name, id or unambiguous start of the id", complete="box")
