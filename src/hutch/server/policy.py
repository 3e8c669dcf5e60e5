"""A box's idle policy, which travels in labels that nobody else sees: so it is recorded with the box, and copied with
it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.core.idle import MIN_SECONDS, Policy
from hutch.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

RESERVED = "hutch.server/"
_STOP, _DELETE, _RESUME = f"{RESERVED}auto-stop", f"{RESERVED}auto-delete", f"{RESERVED}auto-resume"


def to_labels(policy: Policy) -> dict[str, str]:
    """Return the labels that stand for a policy."""
    return {
        _STOP: str(policy.auto_stop),
        _DELETE: str(policy.auto_delete),
        _RESUME: "true" if policy.auto_resume else "false",
    }


def from_labels(labels: Mapping[str, str]) -> Policy:
    """Read the policy of a box. An imported box may carry anything: what makes no sense counts as never."""
    return Policy(_seconds(labels.get(_STOP)), _seconds(labels.get(_DELETE)), labels.get(_RESUME, "true") == "true")


def public(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels that are the user's own."""
    return {key: value for key, value in labels.items() if not key.startswith(RESERVED)}


def check_seconds(field: str, value: int | None, default: int) -> int:
    """Return the value, or the default where there is none. Raises `InvalidArgumentError`."""
    if value is None:
        return default
    if value != 0 and value < MIN_SECONDS:
        raise InvalidArgumentError(f"{field}: {value} is neither 0 (never) nor at least {MIN_SECONDS} seconds")
    return value


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise `InvalidArgumentError` for a label that is the server's."""
    for key in labels:
        if key.startswith(RESERVED):
            raise InvalidArgumentError(f"labels: {key!r:.100} is reserved")


def _seconds(text: str | None) -> int:
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 7:
        return 0
    return int(text) if int(text) >= MIN_SECONDS else 0
