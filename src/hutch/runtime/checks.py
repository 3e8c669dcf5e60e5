"""Checks of what callers pass: each raises `InvalidArgumentError` naming the thing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.errors import ExecError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SECONDS = 4_000_000
"""46 days: what the agent's protocol can carry, and more than anyone means. ``None`` stands for no limit."""


def check_command(command: tuple[str, ...]) -> None:
    """Raise `InvalidArgumentError` for what cannot be an argument vector."""
    if not command or not command[0]:
        raise ExecError("no command was given", command=command, cause="command_not_found")
    for argument in command:
        if not isinstance(argument, str):
            raise InvalidArgumentError(f"the argument {argument!r} is not a string; pass the words one by one")
        if "\0" in argument:
            raise InvalidArgumentError("an argument of a command cannot contain a NUL character")


def check_env(env: Mapping[str, str]) -> Mapping[str, str]:
    """Return the environment. Raises `InvalidArgumentError` naming the variable that cannot be."""
    for name, value in env.items():
        if not name or "=" in name or "\0" in name:
            raise InvalidArgumentError(f"{name!r} is not a name of an environment variable")
        if not isinstance(value, str) or "\0" in value:
            raise InvalidArgumentError(f"the environment variable {name} must be a string without NUL characters")
    return env


def check_seconds(what: str, value: float | None) -> None:
    """Raise `InvalidArgumentError` for what cannot be a time span."""
    if value is not None and not 0 <= value <= MAX_SECONDS:
        raise InvalidArgumentError(f"{what} {value} is not a number of seconds from 0 to {MAX_SECONDS}")


def check_size(rows: int, cols: int) -> None:
    """Raise `InvalidArgumentError` for a terminal size that cannot be."""
    if not (1 <= rows <= 0xFFFF and 1 <= cols <= 0xFFFF):
        raise InvalidArgumentError(f"terminal size {rows}x{cols} is not valid: rows and columns are 1 to 65535")
