"""Completion scripts, generated from the command table. Names of boxes and images are asked for live."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.cli.commands import COMMANDS, NOUNS, find
from hutch.cli.parser import HELP
from hutch.cli.shared_options import GLOBAL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hutch.cli.parser import Command, Option

# What prints the names, a line each. Its errors are nobody's business while someone presses the tab key.
_NAMES = {"box": "hutch ls --names", "image": "hutch image ls --names", "volume": "hutch volume ls -q"}


def _options(command: Command) -> tuple[Option, ...]:
    return (*command.options, *(GLOBAL[:1] if command.here else GLOBAL), HELP)


def _verbs(noun: str) -> list[tuple[str, str]]:
    return [(c.name.split()[1], c.summary) for c in COMMANDS if c.name.startswith(f"{noun} ")]


def _first_words() -> list[tuple[str, str]]:
    plain = [(name, c.summary) for c in COMMANDS if " " not in c.name for name in (c.name, *c.aliases)]
    nouns = [noun for noun in NOUNS if find([noun]) is None]
    return plain + [(noun, "commands: " + ", ".join(verb for verb, _ in _verbs(noun))) for noun in nouns]


def _spelled() -> Iterator[tuple[str, Command]]:
    for command in COMMANDS:
        for name in (command.name, *command.aliases):
            yield name, command


# Plain words are counted up to the cursor. `kinds` has a word for each argument of the command, with a star
# when it repeats; `rest` stands for another command, which completes as files do.
_BASH = """\
# bash completion for hutch
_hutch() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
    local command='' word='' skip='' words='' kind='' last='' i
    local -i count=0
    local -a kinds=()
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${{COMP_WORDS[i]}}
        if [[ -n $skip ]]; then skip=''; continue; fi
        case "$command $word" in
            {valued}) skip=1 ;;
            *' -'*) ;;
            ' '*|{nouns}) command=${{command:+$command }}$word ;;
            *) count+=1 ;;
        esac
    done
    case "$command $previous" in
{values}
    esac
    if [[ -n $skip && -z $kind$words ]]; then kind=file; fi
    if [[ -z $skip ]]; then
        case $command in
{commands}
        esac
        ((${{#kinds[@]}})) && last=${{kinds[${{#kinds[@]}}-1]}}
        if ((count < ${{#kinds[@]}})); then kind=${{kinds[count]}}
        elif [[ $last == *'*' || $last == rest ]]; then kind=$last
        fi
        if [[ $last == rest ]] && ((count > 0)); then words=''; fi
    fi
    case ${{kind%'*'}} in
        box) words+=" $({box} 2>/dev/null)" ;;
        image) words+=" $({image} 2>/dev/null)" ;;
        volume) words+=" $({volume} 2>/dev/null)" ;;
        file|directory|rest) [[ $current == -* && -n $words ]] || COMPREPLY=($(compgen -f -- "$current")) ;;
    esac
    COMPREPLY+=($(compgen -W "$words" -- "$current"))
}}
complete -o filenames -F _hutch hutch
"""


def bash() -> str:
    """The script for bash."""
    valued = [f"' {name}'" for option in GLOBAL if option.metavar for name in option.names]
    values, commands = [], []
    for name, command in _spelled():
        for option in _options(command):
            patterns = "|".join(f"'{name} {flag}'" for flag in option.names)
            if option.metavar:
                valued.append(patterns)
            if option.choices:
                values.append(f"        {patterns}) words='{' '.join(option.choices)}' ;;")
            elif option.complete:
                values.append(f"        {patterns}) kind={option.complete} ;;")
        flags = " ".join(flag for option in _options(command) for flag in option.names)
        kinds, choices = _bash_kinds(command)
        choices += "".join(f" {verb}" for verb, _ in _verbs(name))
        commands.append(f"            '{name}') words='{flags}{choices}'; kinds=({kinds}) ;;")
    for noun in (noun for noun in NOUNS if find([noun]) is None):
        words = " ".join(verb for verb, _ in _verbs(noun))
        commands.append(f"            '{noun}') words='{words} --help' ;;")
    first = " ".join(word for word, _ in _first_words())
    leading = " ".join(name for option in GLOBAL for name in option.names)
    commands.append(f"            '') words='{first} {leading} --version --help' ;;")
    return _BASH.format(
        valued="|".join(valued),
        nouns="|".join(f"'{noun} '*" for noun in NOUNS),
        values="\n".join(values),
        commands="\n".join(commands),
        **_NAMES,
    )


def _bash_kinds(command: Command) -> tuple[str, str]:
    kinds = [
        "rest" if argument.rest else f"'{argument.complete or 'none'}{'*' if argument.many else ''}'"
        for argument in command.arguments
    ]
    return " ".join(kinds), "".join(f" {choice}" for a in command.arguments for choice in a.choices)


def zsh() -> str:
    """The script for zsh."""
    lines = ["#compdef hutch"]
    for kind, source in _NAMES.items():
        lines.append(f'_hutch_{kind}() {{ compadd -- ${{(f)"$({source} 2>/dev/null)"}} }}')
    for noun in NOUNS:
        lines += _zsh_level(f"_hutch_{noun}", _verbs(noun), f"{noun} ")
    lines += _zsh_level("_hutch", _first_words(), "")
    lines.append("compdef _hutch hutch")
    return "\n".join(lines) + "\n"


def _zsh_level(function: str, words: list[tuple[str, str]], prefix: str) -> list[str]:
    """A function that completes one word of a command and hands over to what comes after it."""
    lines = [f"{function}() {{", "  local state", "  local -a words_here", "  words_here=("]
    lines += [f"    '{word}:{_zsh_text(summary)}'" for word, summary in words]
    leading = " ".join(map(_zsh_option, GLOBAL))
    lines += ["  )", f"  _arguments -C {leading} '1: :->word' '*:: :->rest'"]
    lines += ["  case $state in", "    word) _describe command words_here ;;", "    rest) case $words[1] in"]
    for name, command in _spelled():
        if name.startswith(prefix) and " " not in name.removeprefix(prefix):
            specs = " ".join([*map(_zsh_option, _options(command)), *_zsh_arguments(command)])
            action = f"_arguments -S {specs}"
            if verbs := [verb for verb, _ in _verbs(name)]:  # a command, and a noun as well
                action += f" '1: :({' '.join(verbs)})'"
                action = f"case $words[2] in {'|'.join(verbs)}) _hutch_{name} ;; *) {action} ;; esac"
            lines.append(f"      {name.removeprefix(prefix)}) {action} ;;")
    if not prefix:
        lines += [f"      {noun}) _hutch_{noun} ;;" for noun in NOUNS if find([noun]) is None]
    return [*lines, "    esac ;;", "  esac", "}"]


def _zsh_option(option: Option) -> str:
    names = option.names
    repeat = "*" if option.many else ""
    spelled = f"{{{','.join(names)}}}" if len(names) > 1 else names[0]
    exclusive = "" if option.many or len(names) == 1 else f"'({' '.join(names)})'"
    value = f":{_zsh_text(option.metavar)}:{_zsh_action(option)}" if option.metavar else ""
    star = f"'{repeat}'" if repeat else ""
    return f"{exclusive}{star}{spelled}'[{_zsh_text(option.help)}]{value}'"


def _zsh_action(option: Option) -> str:
    if option.choices:
        return f"({' '.join(option.choices)})"
    return {"file": "_files", "directory": "_directories", "": ""}.get(option.complete, f"_hutch_{option.complete}")


def _zsh_arguments(command: Command) -> Iterator[str]:
    for position, argument in enumerate(command.arguments, 1):
        if argument.rest:
            yield "'*::: :_normal'"
            continue
        action = f"({' '.join(argument.choices)})" if argument.choices else ""
        action = action or {"file": "_files", "": ""}.get(argument.complete, f"_hutch_{argument.complete}")
        yield f"'{'*' if argument.many else position}:{argument.name}:{action}'"


def _zsh_text(text: str) -> str:
    for special in "\\[]:":
        text = text.replace(special, f"\\{special}")
    return text.replace("'", "'\\''")


_FISH = """\
# fish completion for hutch
function __hutch_words
    set -l words
    for word in (commandline -opc)[2..-1]
        string match -q -- '-*' $word; or set -a words $word
    end
    string join ' ' -- $words
end
function __hutch_at
    string match -qr -- "^$argv[1]( |\\$)" (__hutch_words)
end
function __hutch_only
    set -l words (__hutch_words)
    test "$words" = "$argv"
end
complete -c hutch -f
"""


def fish() -> str:
    """The script for fish."""
    lines = [_FISH.rstrip("\n"), *(f"complete -c hutch {_fish_option(option)}" for option in GLOBAL)]
    for word, summary in _first_words():
        lines.append(f"complete -c hutch -n '__hutch_only' -a {word} -d {_fish_text(summary)}")
    for noun in NOUNS:
        at_noun = f"__hutch_only {noun}"
        for verb, summary in _verbs(noun):
            lines.append(f"complete -c hutch -n '{at_noun}' -a {verb} -d {_fish_text(summary)}")
    for name, command in _spelled():
        here = f"complete -c hutch -n '__hutch_at \"{name}\"'"
        lines += [f"{here} {_fish_option(option)}" for option in (*command.options, HELP)]
        for argument in command.arguments:
            if argument.complete in _NAMES:
                lines.append(f"{here} -a '({_NAMES[argument.complete]} 2>/dev/null)'")
            elif argument.complete == "file" or argument.rest:
                lines.append(f"{here} -F")
            elif argument.choices:
                lines.append(f"{here} -a '{' '.join(argument.choices)}'")
    return "\n".join(lines) + "\n"


def _fish_option(option: Option) -> str:
    parts = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
    if option.choices:
        parts.append(f"-x -a '{' '.join(option.choices)}'")
    elif option.metavar:
        parts.append({"file": "-r -F", "directory": "-r -a '(__fish_complete_directories)'"}.get(option.complete, "-r"))
    return " ".join([*parts, f"-d {_fish_text(option.help)}"])


def _fish_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
