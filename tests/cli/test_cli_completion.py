"""The completion scripts parse, and bash's completes."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from hutch.cli import completion
from hutch.cli.commands import COMMANDS

SHELLS = {"bash": completion.bash, "zsh": completion.zsh, "fish": completion.fish}


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_parse_and_know_every_command(shell: str) -> None:
    script = SHELLS[shell]()
    for command in COMMANDS:
        assert command.name.split()[-1] in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=20)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("hutch ex", {"exec", "export"}),
        ("hutch image r", {"rm"}),
        ("hutch rm w", {"web"}),
        ("hutch run --pull a", {"always"}),
    ],
)
def test_fish_completes(line: str, offered: set[str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    script = f"function hutch; echo web; end\n{completion.fish()}\ncomplete -C '{line}'"
    result = subprocess.run(["fish", "-c", script], capture_output=True, text=True, check=True, timeout=20)
    assert {word.split("\t")[0] for word in result.stdout.splitlines() if word} == offered


_HARNESS = """
hutch() { case "$*" in
    "ls --names") echo web; echo dev ;; "image ls --names") echo debian:12 ;; "volume ls -q") echo data ;;
esac; }
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _hutch; printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        (["ru"], {"run"}, {"rm"}),
        (["image", "r"], {"rm"}, {"run"}),
        (["exec", ""], {"web", "dev", "--tty"}, {"debian:12"}),
        (["exec", "-e", "A=1", "w"], {"web"}, {"dev"}),
        (["exec", "web", "--"], set(), {"--tty"}),
        (["run", "--isolation", ""], {"auto", "vm", "container"}, {"web"}),
        (["run", "d"], {"debian:12"}, {"dev"}),
        (["snapshot", "rm", "w"], {"web"}, {"dev"}),
        (["rm", "web", "d"], {"dev"}, set()),
        (["volume", "rm", ""], {"data"}, {"web"}),
        (["logs", "-n", ""], set(), {"web"}),
        (["cp", "-n", "x", ""], set(), {"web"}),
        (["--url", "u", "--local", "rm", "w"], {"web"}, {"dev"}),
        (["serve", ""], {"api", "runner", "--database"}, {"--url"}),
        (["serve", "runner", "--"], {"--join"}, {"--api-key"}),
        (["auth", "l"], {"login", "logout"}, {"whoami"}),
    ],
)
def test_bash_completes(line: list[str], offered: set[str], not_offered: set[str]) -> None:
    script = completion.bash() + _HARNESS
    result = subprocess.run(
        ["bash", "-c", script, "bash", "hutch", *line], capture_output=True, text=True, check=True, timeout=20
    )
    words = set(result.stdout.split())
    assert offered <= words
    assert not words & not_offered
    assert result.stderr == ""
