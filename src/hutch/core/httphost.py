"""Whom an HTTP request is for, in one meaning that nobody on the way can read otherwise."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hutch.core.policy import plain_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    import h11

_AUTHORITY = re.compile(rb"([^\s:/?#@\[\]]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?#]*)")


def host(request: h11.Request) -> tuple[str, int | None]:
    """Return the name (as `plain_name` spells it; an address stays as it is) and the port, where one is named, of a
    request's Host.

    Raises `ValueError` when there is none, more than one, or when the target names another (RFC 9112, 3.2).
    """
    values = [value for name, value in request.headers if name == b"host"]
    if len(values) != 1:
        raise ValueError("the request needs one Host")
    found = _parse(values[0])
    if request.method == b"CONNECT":
        raise ValueError("CONNECT is for proxies")
    if absolute := _ABSOLUTE.match(request.target):
        if _parse(absolute[1]) != found:
            raise ValueError("the target names another host than Host does")
    elif not request.target.startswith(b"/") and request.target != b"*":
        raise ValueError("the target is neither a path nor a URL")
    return found


def host_of_fields(fields: Iterable[tuple[bytes, bytes]]) -> tuple[str, int | None]:
    """Return the same of the head of an HTTP/2 request over TLS. Raises `ValueError` as `host` does, and for what is
    not a plain request."""
    fields = list(fields)
    authorities = {value for name, value in fields if name in (b":authority", b"host")}
    if len(authorities) != 1:
        raise ValueError("the request needs one authority")
    pseudo = {name: value for name, value in fields if name.startswith(b":")}
    if pseudo.get(b":method") == b"CONNECT" or b":protocol" in pseudo:
        raise ValueError("CONNECT is for proxies")
    if pseudo.get(b":scheme") != b"https":
        raise ValueError("the request is for another scheme than https")
    if not pseudo.get(b":path", b"").startswith(b"/") and pseudo.get(b":path") != b"*":
        raise ValueError("the target is not a path")
    return _parse(authorities.pop())


def with_authority(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the head of an HTTP/2 request that names its host once, as ``:authority``."""
    fields = list(fields)
    if not any(name == b":authority" for name, _ in fields):
        fields.insert(0, (b":authority", next(value for name, value in fields if name == b"host")))
    return [field for field in fields if field[0] != b"host"]


def _parse(authority: bytes) -> tuple[str, int | None]:
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise ValueError("malformed host")
    text = match[1].decode("ascii")
    name = plain_name(text) or text.strip("[]").lower()
    return name, None if match[2] is None else int(match[2])


def path(target: bytes) -> bytes:
    """Return a target without scheme and host, as a server of one host expects it."""
    absolute = _ABSOLUTE.match(target)
    if absolute is None:
        return target
    rest = target[absolute.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest
