"""The parser: the usual grammar, and nothing of another command taken for ours."""

from __future__ import annotations

import pytest

from hutch.cli.commands import COMMANDS, find
from hutch.cli.parser import Argument, Option, UsageError, command_help, leading_options, parse
from hutch.cli.shared_options import GLOBAL

NUMBER = Option("-n --number", "N", "a number", parse=int)
SWITCHES = (Option("-i --in", "", "in"), Option("-t --tty", "", "tty"))
ENV = Option("-e --env", "X", "many", many=True)
OPTIONS = (NUMBER, *SWITCHES, ENV)
BOX = Argument("BOX", "a box")
REST = Argument("COMMAND", "a command", rest=True)


@pytest.mark.parametrize(
    "words",
    [
        ["-it", "-n3", "-eA", "-e", "B=1", "box"],
        ["--in", "--tty", "--number=3", "--env=A", "--env", "B=1", "box"],
        ["box", "-n", "3", "-tieA", "-e", "B=1"],
        ["-i", "-t", "-n", "3", "-e", "A", "-eB=1", "--", "box"],
    ],
)
def test_spellings_mean_the_same(words: list[str]) -> None:
    args = parse(OPTIONS, (BOX,), words)
    assert (vars(args)["in"], args.tty) == (True, True)
    assert (args.number, args.env, args.box) == (3, ["A", "B=1"], "box")


def test_what_was_not_given() -> None:
    args = parse(OPTIONS, (BOX,), ["box"])
    assert (args.tty, args.number, args.env, args.help) == (False, None, [], False)


@pytest.mark.parametrize("words", [["box", "ls", "-n", "-it", "--", "x"], ["box", "--", "ls", "-n", "-it", "--", "x"]])
def test_the_other_command_is_verbatim(words: list[str]) -> None:
    args = parse(OPTIONS, (BOX, REST), ["-i", *words])
    assert args.command == ["ls", "-n", "-it", "--", "x"]
    assert (args.tty, args.number) == (False, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nope", "box"], "unknown option --nope"),
        (["-x", "box"], "unknown option -x"),
        (["-n", "x", "box"], "-n: "),
        (["box", "-n"], "-n needs a value"),
        (["--tty=yes", "box"], "--tty takes no value"),
        ([], "BOX is missing"),
        (["a", "b"], "unexpected argument 'b'"),
        (["--num=3", "box"], "unknown option --num"),
    ],
)
def test_errors_name_the_culprit(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(OPTIONS, (BOX,), words)


def test_options_after_the_box_are_refused_not_guessed() -> None:
    with pytest.raises(UsageError, match="options go before BOX"):
        parse(OPTIONS, (BOX, REST), ["box", "-it", "sh"])
    with pytest.raises(UsageError, match="COMMAND is missing"):
        parse(OPTIONS, (BOX, REST), ["box"])


def test_choices() -> None:
    option = Option("--kind", "K", "kind", choices=("a", "b"))
    assert parse((option,), (), ["--kind", "b"]).kind == "b"
    with pytest.raises(UsageError, match="'c' is none of a, b"):
        parse((option,), (), ["--kind", "c"])


def test_several_before_a_single_one() -> None:
    many = (Argument("SOURCE", "", many=True), Argument("TARGET", ""))
    args = parse((), many, ["a", "b", "c"])
    assert (args.source, args.target) == (["a", "b"], "c")
    with pytest.raises(UsageError, match="SOURCE is missing"):
        parse((), many, ["a"])


def test_leading_options_stop_at_the_first_word() -> None:
    values, rest = leading_options(GLOBAL, ["--home", "/h", "run", "--home", "x"])
    assert (values.home, rest) == ("/h", ["run", "--home", "x"])
    assert leading_options(GLOBAL, [])[1] == []


def test_help_wins_over_what_is_missing() -> None:
    assert parse(OPTIONS, (BOX,), ["-i", "--help"]).help


def test_the_table_is_sound() -> None:
    names = [name for command in COMMANDS for name in (command.name, *command.aliases)]
    assert len(names) == len(set(names))
    for command in COMMANDS:
        assert find(command.name.split()) is command
        flags = [flag for option in (*command.options, *GLOBAL) for flag in option.names]
        assert len(flags) == len(set(flags)), command.name
        keys = [a.key for a in command.arguments] + [o.key for o in command.options]
        assert len(keys) == len(set(keys)), command.name
        text = command_help(command, GLOBAL, 80)
        assert max(map(len, text.splitlines())) <= 110
        for flag in flags:
            assert flag in text
