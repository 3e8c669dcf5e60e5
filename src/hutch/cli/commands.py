"""The table of all commands: what they are called, what they take, what their help says.

Parsing, help and shell completion read it; the handlers are named as text, so that a command imports only
what it needs. ``complete`` names what the shell completes: box, image, volume, file, directory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.cli.box_commands import BOX_COMMANDS
from hutch.cli.network_commands import NETWORK_COMMANDS
from hutch.cli.server_commands import SERVER_COMMANDS
from hutch.cli.store_commands import STORE_COMMANDS

if TYPE_CHECKING:
    from hutch.cli.parser import Command

COMMANDS = (*BOX_COMMANDS, *NETWORK_COMMANDS, *STORE_COMMANDS, *SERVER_COMMANDS)

NOUNS = tuple(dict.fromkeys(command.name.split()[0] for command in COMMANDS if " " in command.name))


def find(words: list[str]) -> Command | None:
    """The command that a list of one or two words names."""
    name = " ".join(words)
    return next((command for command in COMMANDS if name == command.name or name in command.aliases), None)
