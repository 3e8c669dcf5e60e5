"""Checks of what callers pass: each raises `InvalidArgumentError` naming the thing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hutch.errors import ExecError, InvalidArgumentError

_SHOWN = 100
_PATH_MAX, _NAME_MAX = 4096, 255

MAX_SECONDS = 4_000_000
"""46 days: what the agent's protocol can carry, and more than anyone means. ``None`` stands for no limit."""


def quoted(value: object) -> str:
    """Return a value as it is shown in a message: escaped, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def check_text(what: str, value: object) -> str:
    """Return the value. Raises `InvalidArgumentError` for what is not a string that the operating system can take."""
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{what} {quoted(value)} is not a string")
    if "\0" in value:
        raise InvalidArgumentError(f"{what} {quoted(value)} cannot contain a NUL character")
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidArgumentError(f"{what} {quoted(value)} has characters that are none") from None
    return value


def check_path(what: str, value: object) -> Path:
    """Return the value as a path of the host. Raises `InvalidArgumentError`."""
    text = check_text(what, os.fspath(value) if isinstance(value, os.PathLike) else value)
    name = os.fsencode(text)
    if len(name) >= _PATH_MAX or any(len(part) > _NAME_MAX for part in name.split(b"/")):
        raise InvalidArgumentError(f"{what} {quoted(text)} is too long for a path")
    return Path(text)


def check_name(what: str, value: object) -> str:
    """Return the value. Raises `InvalidArgumentError` for what could not be recorded as a name."""
    text = check_text(what, value)
    if not text.isascii():
        raise InvalidArgumentError(f"{what} {quoted(text)} has characters that no name has")
    return text


def check_bytes(what: str, value: object) -> None:
    """Raise `InvalidArgumentError` for what is not bytes."""
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise InvalidArgumentError(f"{what} must be bytes, not {type(value).__name__}")


def check_whole(what: str, value: object, low: int, high: int) -> None:
    """Raise `InvalidArgumentError` for what is not a whole number in the range."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidArgumentError(f"{what} {quoted(value)} is not a whole number from {low} to {high}")


def check_callable(what: str, value: object) -> None:
    """Raise `InvalidArgumentError` for what cannot be called; ``None`` is no such thing, and allowed."""
    if value is not None and not callable(value):
        raise InvalidArgumentError(f"{what} {quoted(value)} cannot be called")


def check_sink(what: str, value: object) -> None:
    """Raise `InvalidArgumentError` for what nothing can be written to."""
    if not callable(getattr(value, "write", value)):
        raise InvalidArgumentError(f"{what} {quoted(value)} is neither a writer nor a function")


def check_command(command: tuple[str, ...]) -> None:
    """Raise `InvalidArgumentError` for what cannot be an argument vector."""
    if not command or command[0] == "":
        raise ExecError("no command was given", command=command, cause="command_not_found")
    for argument in command:
        check_text("the argument of a command", argument)


def check_env(env: Mapping[str, str]) -> Mapping[str, str]:
    """Return the environment. Raises `InvalidArgumentError` naming the variable that cannot be."""
    if not isinstance(env, Mapping):
        raise InvalidArgumentError(f"the environment {quoted(env)} is not a mapping of names to values")
    for name, value in env.items():
        if not check_text("the environment variable", name) or "=" in name:
            raise InvalidArgumentError(f"{quoted(name)} is not a name of an environment variable")
        check_text(f"the value of the environment variable {name}:", value)
    return env


def check_seconds(what: str, value: float | None, *, endless: bool = True) -> None:
    """Raise `InvalidArgumentError` for what cannot be a time span. ``endless``: ``None`` can."""
    if value is None and endless:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_SECONDS:
        raise InvalidArgumentError(f"{what} {quoted(value)} is not a number of seconds from 0 to {MAX_SECONDS}")


def check_size(rows: int, cols: int) -> None:
    """Raise `InvalidArgumentError` for a terminal size that cannot be."""
    check_whole("the rows of a terminal:", rows, 1, 0xFFFF)
    check_whole("the columns of a terminal:", cols, 1, 0xFFFF)


def check_start(
    command: tuple[str, ...],
    env: Mapping[str, str] | None,
    cwd: str | None,
    user: str | None,
    timeout: float | None,
    kill_after: float,
    linger: float | None,
    file_op: object,
) -> None:
    """Raise `InvalidArgumentError` or `ExecError` for what no command can be started with."""
    if file_op is None:
        check_command(command)
    check_seconds("timeout", timeout)
    check_seconds("kill_after", kill_after, endless=False)
    check_seconds("linger", linger)
    check_env(env or {})
    for what, text in (("cwd", cwd), ("user", user)):
        if text is not None:
            check_text(what, text)
