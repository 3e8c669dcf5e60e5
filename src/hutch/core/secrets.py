"""Placeholders of secrets in requests, and the values that take their place on the way to the hosts of the secret.

Only the head of a request is looked at: header values (also inside the base64 of Basic credentials) and the query.
Bodies and paths are passed on as they are: what a server reflects from there must not be a secret.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING
from urllib.parse import quote_from_bytes

import msgspec
from hpack import NeverIndexedHeaderTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    import h11

    from hutch.types import Secret

HTTPS_PORT = 443

_BASIC = b"basic "


class Substitution(msgspec.Struct, frozen=True):
    """One secret for the requests to one host. ``repr`` does not show the value."""

    placeholder: bytes
    value: bytes

    def __repr__(self) -> str:
        return f"Substitution({self.placeholder!r})"


class Authority(msgspec.Struct, frozen=True):
    """Key and certificate of a box's own certificate authority, as PEM. The key never enters the box."""

    key: str
    certificate: str

    def __repr__(self) -> str:
        return "Authority(…)"


def placeholder(secret: Secret) -> str:
    """Return what a box sees in the place of a secret."""
    return secret.placeholder or f"<HUTCH_SECRET:{secret.name}>"


def host_rules(secret: Secret) -> list[str]:
    """Return the rules that admit the hosts of a secret: at port 443 where they name none."""
    return [host if ":" in host else f"{host}:{HTTPS_PORT}" for host in secret.hosts]


def substitute(request: h11.Request, secrets: Iterable[Substitution]) -> h11.Request:
    """Return the request with the values in the places of their placeholders."""
    secrets = tuple(secrets)
    headers = [(name, _in_header(name, value, secrets)) for name, value in request.headers.raw_items()]
    return type(request)(method=request.method, target=_in_target(request.target, secrets), headers=headers)


def substitute_fields(
    fields: Iterable[tuple[bytes, bytes]], secrets: Iterable[Substitution]
) -> list[tuple[bytes, bytes]]:
    """Return the head of an HTTP/2 request with the values in the places of their placeholders. What has changed is
    marked: no table of header compression may hold it."""
    secrets = tuple(secrets)
    changed = []
    for field in fields:
        name, value = field
        if name == b":path":
            new = _in_target(value, secrets)
        else:
            new = value if name.startswith(b":") else _in_header(name, value, secrets)
        changed.append(field if new == value else NeverIndexedHeaderTuple(name, new))
    return changed


def _in_header(name: bytes, value: bytes, secrets: tuple[Substitution, ...]) -> bytes:
    if name.lower() == b"authorization" and value[: len(_BASIC)].lower() == _BASIC:
        try:
            plain = base64.b64decode(value[len(_BASIC) :].strip(), validate=True)
        except binascii.Error:
            return value
        changed = _replace(plain, secrets)
        return value if changed == plain else value[: len(_BASIC)] + base64.b64encode(changed)
    return value if name.lower() == b"host" else _replace(value, secrets)


def _in_target(target: bytes, secrets: tuple[Substitution, ...]) -> bytes:
    path, mark, query = target.partition(b"?")
    for secret in secrets:
        encoded = quote_from_bytes(secret.value, safe="").encode()
        for form in _forms(secret.placeholder):
            query = query.replace(form, encoded)
    return path + mark + query


def _replace(text: bytes, secrets: tuple[Substitution, ...]) -> bytes:
    for secret in secrets:
        text = text.replace(secret.placeholder, secret.value)
    return text


def _forms(text: bytes) -> list[bytes]:
    """How clients write a placeholder into a query: which characters they encode, and in which case, differs."""
    colons = (text, text.replace(b":", b"%3A"), text.replace(b":", b"%3a"))
    brackets = ((b"%3C", b"%3E"), (b"%3c", b"%3e"), (b"<", b">"))
    return [form.replace(b"<", left).replace(b">", right) for form in colons for left, right in brackets]
