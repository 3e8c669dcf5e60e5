"""The entry point: find the command, run it, turn what happened into an exit code.

0 success · 1 runtime error (``Error: …`` on standard error) · 2 usage error · the exit code of the
command that ran in the box · 128+N when signal N ended that command, or this tool · 141 when the reader
of the output went away.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING

from hutch.cli.commands import COMMANDS, NOUNS, find
from hutch.cli.parser import HELP, Option, UsageError, command_help, definitions, leading_options, parse
from hutch.cli.shared_options import GLOBAL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hutch.cli.parser import Arguments, Command

RUNTIME_ERROR, USAGE_ERROR, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
_VERSION = Option("-V --version", "", "show the version")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool with these arguments (default: the process's own) and return its exit code."""
    _standard_streams()
    try:
        code = _dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Quiet, as a program that SIGPIPE ends; Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED


def _standard_streams() -> None:
    """See that 0, 1 and 2 are open (or else the next file opened would be taken for one), and print anything."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _dispatch(words: Sequence[str]) -> int:
    try:
        first, rest = leading_options((*GLOBAL, _VERSION), words)
    except UsageError as error:
        return _usage(str(error), "hutch --help")
    if first.help:
        sys.stdout.write(_overview(COMMANDS))
        return 0
    if first.version:
        from importlib.metadata import version

        sys.stdout.write(f"hutch {version('hutch')}\n")
        return 0
    if not rest:
        sys.stderr.write(_overview(COMMANDS))
        return USAGE_ERROR
    if rest[0] in NOUNS and (command := find(rest[:2])) is not None:
        return _command(command, rest[2:], first)
    if (command := find(rest[:1])) is not None:
        return _command(command, rest[1:], first)
    if rest[0] in NOUNS:
        return _noun(rest)
    return _unknown(rest[0], [name for c in COMMANDS for name in (c.name.split()[0], *c.aliases)])


def _noun(words: list[str]) -> int:
    """A noun without any of its verbs."""
    noun, rest = words[0], words[1:]
    verbs = [command for command in COMMANDS if command.name.startswith(noun + " ")]
    if rest and rest[0] in HELP.names:
        sys.stdout.write(_overview(verbs, f"hutch {noun} COMMAND"))
        return 0
    if not rest:
        sys.stderr.write(_overview(verbs, f"hutch {noun} COMMAND"))
        return USAGE_ERROR
    return _unknown(f"{noun} {rest[0]}", [verb.name for verb in verbs])


def _command(command: Command, words: Sequence[str], first: Arguments) -> int:
    """``first``: the options before the command's name."""
    try:
        args = parse((*command.options, *GLOBAL), command.arguments, words)
        if args.help:
            sys.stdout.write(command_help(command, GLOBAL[:1] if command.here else GLOBAL, _width()))
            return 0
        for option in GLOBAL:
            setattr(args, option.key, getattr(args, option.key) or getattr(first, option.key))
        _check_place(command, args)
        return _run(command, args)
    except UsageError as error:
        return _usage(f"hutch {command.name}: {error}", f"hutch {command.name} --help", command.usage)


def _check_place(command: Command, args: Arguments) -> None:
    if args.local and (args.url or args.profile):
        raise UsageError("--local: cannot be combined with --url or --profile")
    if command.here and (args.url or args.profile):
        raise UsageError(f"{'--url' if args.url else '--profile'}: this command is about the machine that it runs on")


def _run(command: Command, args: Arguments) -> int:
    # What only a command that really runs needs is imported here, which keeps help and usage errors fast.
    from importlib import import_module

    import anyio

    from hutch.cli import output
    from hutch.cli.session import Session
    from hutch.errors import HutchError

    module, _, function = command.handler.partition(":")
    handler = getattr(import_module(f"hutch.cli.{module}"), function)

    async def supervised() -> int:
        session = Session(args.home, url=args.url, profile=args.profile, local=args.local or command.here)
        return await session.run(lambda: handler(session, args))

    try:
        return anyio.run(supervised)
    except Exception as problem:
        error = _innermost(problem)
        if os.environ.get("HUTCH_DEBUG"):
            import traceback

            traceback.print_exception(problem)
        if isinstance(error, (UsageError, BrokenPipeError)):
            raise error from None
        if isinstance(error, (HutchError, OSError)):
            output.error(error)
        else:
            output.note(f"Error: unexpected {type(error).__name__}: {error} (HUTCH_DEBUG=1 shows where)")
        return RUNTIME_ERROR


def _innermost(error: Exception) -> Exception:
    """The first error inside the groups that task groups wrap it in."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _usage(message: str, help_command: str, usage: str = "") -> int:
    lines = [message, f"Usage: {usage}" if usage else "", f"See '{help_command}'."]
    sys.stderr.write("".join(f"{line}\n" for line in lines if line))
    return USAGE_ERROR


def _unknown(name: str, known: list[str]) -> int:
    from difflib import get_close_matches

    close = get_close_matches(name, known, 1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return _usage(f"hutch: unknown command {name!r}{hint}", "hutch --help")


def _overview(commands: Sequence[Command], usage: str = "hutch [--url URL] COMMAND") -> str:
    parts = [f"Usage: {usage}"]
    if len(commands) == len(COMMANDS):
        parts.append("Run untrusted commands in isolated Linux boxes.")
    for group in dict.fromkeys(command.group for command in commands):
        rows = [(command.name, command.summary) for command in commands if command.group == group]
        parts.append(f"{group}:\n" + definitions(rows, _width()))
    options = [
        (", ".join(option.names) + f" {option.metavar}".rstrip(), option.help) for option in (*GLOBAL, _VERSION, HELP)
    ]
    if len(commands) == len(COMMANDS):
        parts.append("Options:\n" + definitions(options, _width()))
    parts.append(f"'{usage.replace('[--url URL] ', '')} --help' tells more about a command.")
    return "\n\n".join(parts) + "\n"


def _width() -> int:
    try:
        return max(min(os.get_terminal_size().columns, 110), 50)
    except OSError:
        return 100
