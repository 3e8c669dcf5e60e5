"""Identifiers: 12 base-62 characters, and the names that people give."""

from __future__ import annotations

import re
import string

from hutch.errors import InvalidArgumentError

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
LENGTH = 12

_ID = re.compile(r"[0-9A-Za-z]{12}\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_RULE = "characters, letters, digits, '.', '_' and '-', starting with a letter or digit"
_VOLUME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,127}\Z")


def from_random(entropy: bytes) -> str:
    """Turn at least 9 random bytes into an id (the bias of the modulus is below 2^-0.5 bits over the whole id)."""
    number = int.from_bytes(entropy, "big")
    chars = []
    for _ in range(LENGTH):
        number, digit = divmod(number, 62)
        chars.append(ALPHABET[digit])
    return "".join(chars)


def is_id(text: str) -> bool:
    """Whether the text has the form of an id."""
    return _ID.match(text) is not None


def check_id(text: str) -> str:
    """Return the id if it is one. Raises `InvalidArgumentError`."""
    if not isinstance(text, str) or not is_id(text):
        raise InvalidArgumentError(f"box_id {text!r:.100} is not an id: {LENGTH} letters and digits")
    return text


def check_name(name: str, what: str = "box") -> str:
    """Return the name if it is legal. Raises `InvalidArgumentError`."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise InvalidArgumentError(f"{what} name {name!r:.100} is not valid: 1 to 128 {_RULE}")
    return name


def check_volume_name(name: str) -> str:
    """Return the volume name if it is legal. Raises `InvalidArgumentError`."""
    if not isinstance(name, str) or not _VOLUME.match(name):
        raise InvalidArgumentError(f"volume name {name!r:.100} is not valid: 2 to 128 {_RULE}")
    return name
