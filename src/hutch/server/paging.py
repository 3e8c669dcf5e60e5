"""Lists page by page, for those who ask; for others everything is one page."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Annotated, TypeVar

from fastapi import Query

from hutch.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")
_Size = Annotated[int | None, Query(ge=1, le=1000)]
_Token = Annotated[str | None, Query(max_length=400)]


class Page:
    """What a client asks for. ``next_token`` is set by `of` when there is more."""

    def __init__(
        self,
        pageSize: _Size = None,
        page_size: _Size = None,
        pageToken: _Token = None,
        page_token: _Token = None,
    ) -> None:
        self._size = page_size if pageSize is None else pageSize
        self._token = page_token if pageToken is None else pageToken
        self.next_token: str | None = None

    def of(self, items: Iterable[T], order: Callable[[T], tuple[float, str]]) -> list[T]:
        """The items of the page, in their order, which no two of them share. Raises `InvalidArgumentError` for a token
        that was made up."""
        found = sorted(items, key=order)
        if self._token is not None:
            after = _read(self._token)
            found = [item for item in found if order(item) > after]
        if self._size is not None and len(found) > self._size:
            found = found[: self._size]
            self.next_token = _write(order(found[-1]))
        return found


def _write(place: tuple[float, str]) -> str:
    return base64.urlsafe_b64encode(f"{place[0]!r} {place[1]}".encode()).decode()


def _read(token: str) -> tuple[float, str]:
    try:
        when, _, name = base64.b64decode(token, altchars=b"-_", validate=True).decode().partition(" ")
        return float(when), name
    except (binascii.Error, ValueError):
        raise InvalidArgumentError("pageToken: it is not one that this server has given") from None
