"""Doing the same with several things that the user named: what fails is told, the others are done all the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from hutch.cli import output
from hutch.errors import HutchError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

T = TypeVar("T")


async def each(names: Iterable[str], action: Callable[[str], Awaitable[T]]) -> tuple[list[tuple[str, T]], int]:
    """Do it with one after the other. Return the names with what came of them, without those that failed, and the
    exit code."""
    done, code = [], 0
    for name in names:
        try:
            done.append((name, await action(name)))
        except HutchError as error:
            output.error(error)
            code = 1
    return done, code


async def inspect(names: Iterable[str], get: Callable[[str], Awaitable[object]]) -> int:
    """Print records as a JSON array; what is found is printed even when another is not."""
    found, code = await each(names, get)
    output.json_value([record for _, record in found])
    return code
