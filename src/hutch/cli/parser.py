"""A small command line parser that is driven by a table.

The same table (`hutch.cli.commands`) drives parsing, help and shell completion. Importing it costs next to
nothing, which is what keeps ``hutch --help`` fast. The grammar is the usual one (POSIX 12.2 with GNU long
options): ``-it``, ``-eA=1``, ``-e A=1``, ``--env=A=1``, ``--`` ends the options. A command that takes another
command (``run IMAGE COMMAND…``) reads its own options only before its first argument, so that nothing of the
other command is ever taken for an option of this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Arguments = SimpleNamespace


class UsageError(Exception):
    """The command line is wrong (exit code 2). The message names the option or argument."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option; ``flags`` as in ``"-e --env"``, no ``metavar`` for a switch. ``parse`` raises ValueError."""

    flags: str
    metavar: str
    help: str
    parse: Callable[[str], Any] = str
    default: str | None = None
    many: bool = False
    choices: tuple[str, ...] = ()
    complete: str = ""

    @property
    def names(self) -> list[str]:
        """The spellings: ``["-e", "--env"]``."""
        return self.flags.split()

    @property
    def key(self) -> str:
        """The attribute under which the value is found: that of the last spelling."""
        return self.names[-1].lstrip("-").replace("-", "_")


@dataclass(frozen=True, slots=True)
class Argument:
    """A positional argument. ``rest``: all that follows, verbatim. ``many``: one or more."""

    name: str
    help: str
    many: bool = False
    optional: bool = False
    rest: bool = False
    choices: tuple[str, ...] = ()
    complete: str = ""

    @property
    def key(self) -> str:
        """The attribute under which the value is found."""
        return self.name.lower()

    @property
    def usage(self) -> str:
        """How the usage line shows it."""
        text = self.name + ("..." if self.many or self.rest else "")
        return f"[{text}]" if self.optional else text


@dataclass(frozen=True, slots=True)
class Command:
    """A command: ``name`` may have two words; ``handler`` is ``"module:function"``, imported when it runs. ``here``: it
    is about this machine and cannot be asked of a server."""

    name: str
    group: str
    summary: str
    handler: str
    arguments: tuple[Argument, ...] = ()
    options: tuple[Option, ...] = ()
    examples: tuple[str, ...] = ()
    notes: str = ""
    aliases: tuple[str, ...] = ()
    here: bool = False

    @property
    def usage(self) -> str:
        """The usage line."""
        words = ["hutch", self.name, "[OPTIONS]", *(argument.usage for argument in self.arguments)]
        return " ".join(words)


HELP = Option("-h --help", "", "show this help")


def parse(options: Iterable[Option], arguments: Sequence[Argument], words: Sequence[str]) -> Arguments:
    """Parse the words after a command's name. Raises `UsageError`. After ``-h`` only ``help`` counts."""
    table = {name: option for option in (*options, HELP) for name in option.names}
    values: dict[str, Any] = {
        option.key: [] if option.many else False if not option.metavar else _default(option)
        for option in table.values()
    }
    stop_early = any(argument.rest for argument in arguments)
    positional: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--":
            positional += queue
            break
        if word.startswith("-") and word != "-":
            _option(table, values, word, queue)
            if values["help"]:
                return SimpleNamespace(**values)
            continue
        positional.append(word)
        if stop_early:
            positional += queue
            break
    values.update(_positional(arguments, positional))
    return SimpleNamespace(**values)


def leading_options(options: Iterable[Option], words: Sequence[str]) -> tuple[Arguments, list[str]]:
    """Parse the options before the first plain word; return their values and the rest from that word on."""
    rest = Argument("REST", "", rest=True, optional=True)
    table = [*options]
    values = parse(table, (rest,), words)
    return values, getattr(values, "rest", [])


def _default(option: Option) -> Any:
    return None if option.default is None else option.parse(option.default)


def _option(table: dict[str, Option], values: dict[str, Any], word: str, queue: list[str]) -> None:
    if word.startswith("--"):
        name, equals, value = word.partition("=")
    else:
        name, value = word[:2], word[2:]
        equals = value
    option = table.get(name)
    if option is None:
        raise UsageError(f"unknown option {name}")
    if not option.metavar:
        if equals and name.startswith("--"):
            raise UsageError(f"{name} takes no value")
        if equals:  # a cluster of short switches: the rest of it is the next word
            queue.insert(0, f"-{value}")
        values[option.key] = True
        return
    if not equals:
        if not queue:
            raise UsageError(f"{name} needs a value ({option.metavar})")
        value = queue.pop(0)
    if option.choices and value not in option.choices:
        raise UsageError(f"{name}: {value!r} is none of {', '.join(option.choices)}")
    try:
        parsed = option.parse(value)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None
    if option.many:
        values[option.key].append(parsed)
    else:
        values[option.key] = parsed


def _positional(arguments: Sequence[Argument], words: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for index, argument in enumerate(arguments):
        if argument.rest:
            values[argument.key], words = _rest(argument, arguments[0], words), []
        elif argument.many:
            keep = len(arguments) - index - 1  # those after it are single ones
            cut = max(len(words) - keep, 0)
            values[argument.key], words = words[:cut], words[cut:]
        else:
            values[argument.key] = words.pop(0) if words else None
        if not argument.optional and not values[argument.key]:
            raise UsageError(f"{argument.name} is missing")
        if argument.choices and values[argument.key] and values[argument.key] not in argument.choices:
            raise UsageError(f"{argument.name}: {values[argument.key]!r} is none of {', '.join(argument.choices)}")
    if words:
        raise UsageError(f"unexpected argument {words[0]!r}")
    return values


def _rest(argument: Argument, first: Argument, words: list[str]) -> list[str]:
    if words[:1] == ["--"]:
        return words[1:]
    if words and words[0].startswith("-") and first is not argument:
        raise UsageError(
            f"{words[0]!r} after {first.name}: options go before {first.name}; "
            f"a {argument.name.lower()} that starts with a dash needs `--` in front"
        )
    return words


def command_help(command: Command, common: Iterable[Option], width: int) -> str:
    """The text of ``hutch COMMAND --help``."""
    parts = [f"Usage: {command.usage}", command.summary + "."]
    if command.notes:
        parts.append(_fill(command.notes, width, ""))
    if command.arguments:
        rows = [(argument.name, argument.help) for argument in command.arguments]
        parts.append("Arguments:\n" + definitions(rows, width))
    rows = [(_spelling(option), _described(option)) for option in (*command.options, *common, HELP)]
    parts.append("Options:\n" + definitions(rows, width))
    if command.examples:
        parts.append("Examples:\n" + "\n".join(f"  {example}" for example in command.examples))
    return "\n\n".join(parts) + "\n"


def definitions(rows: Iterable[tuple[str, str]], width: int) -> str:
    """Two columns, the second wrapped."""
    rows = list(rows)
    left = min(max(len(term) for term, _ in rows), 28)
    lines = []
    for term, text in rows:
        body = _fill(text, width, " " * (left + 4)).lstrip()
        gap = " " * (left + 4 - 2 - len(term)) if len(term) <= left else "\n" + " " * (left + 4)
        lines.append(f"  {term}{gap}{body}".rstrip())
    return "\n".join(lines)


def _spelling(option: Option) -> str:
    names = option.names
    text = ", ".join(names) if names[0][1] != "-" else "    " + ", ".join(names)
    return f"{text} {option.metavar}" if option.metavar else text


def _described(option: Option) -> str:
    extra = []
    if option.choices:
        extra.append("one of " + ", ".join(option.choices))
    if option.default is not None:
        extra.append(f"default {option.default}")
    if option.many:
        extra.append("repeatable")
    return f"{option.help} ({'; '.join(extra)})" if extra else option.help


def _fill(text: str, width: int, indent: str) -> str:
    import textwrap  # only help pays for it

    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
