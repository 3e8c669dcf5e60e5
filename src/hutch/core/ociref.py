"""Image references, as every container tool reads them.

The grammar and the rules of familiar names are those of github.com/distribution/reference (Apache-2.0):

    reference = [domain "/"] path [":" tag] ["@" digest]

``busybox`` means ``docker.io/library/busybox:latest``; a first component is a domain when it has a dot or a colon,
is ``localhost`` or has a capital letter.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from hutch.errors import InvalidArgumentError

DEFAULT_DOMAIN: Final = "docker.io"
DEFAULT_TAG: Final = "latest"
_OFFICIAL: Final = "library/"
_LEGACY_DOMAIN: Final = "index.docker.io"
_MAX_NAME: Final = 255
_HEX_LENGTH: Final = {"sha256": 64, "sha512": 128}

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_HEX = re.compile(r"[a-f0-9]+")


class Reference(msgspec.Struct, frozen=True):
    """A parsed reference. A tag, a digest or both are set; where both are, the digest decides."""

    domain: str
    path: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        """The full form, which identifies the reference in the store."""
        return f"{self.domain}/{self.path}{self._suffix()}"

    @property
    def familiar(self) -> str:
        """The short form that people type."""
        path = self.path
        if self.domain != DEFAULT_DOMAIN:
            path = f"{self.domain}/{path}"
        elif path.startswith(_OFFICIAL) and path.count("/") == 1:
            path = path.removeprefix(_OFFICIAL)
        return path + self._suffix()

    @property
    def target(self) -> str:
        """What a registry is asked for: the digest, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def is_digest(text: str) -> bool:
    """Whether the text is a digest that can be checked (OCI image-spec, descriptor.md: sha256 or sha512)."""
    algorithm, _, value = text.partition(":")
    return len(value) == _HEX_LENGTH.get(algorithm) and _HEX.fullmatch(value) is not None


def parse(text: str) -> Reference:
    """Parse a reference and fill in what was left out (domain, ``library/``, tag).

    Raises `InvalidArgumentError` that says which part is wrong.
    """

    def wrong(cause: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"image reference {text[:300]!r}: {cause}")

    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise wrong(f"{digest!r} is not a digest (sha256: and 64 hexadecimal digits)")
    domain, rest = _split_domain(rest)
    path, colon, tag = rest.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise wrong(f"{tag!r} is not a tag (at most 128 letters, digits, '_', '.' and '-')")
    if not _DOMAIN.fullmatch(domain):
        raise wrong(f"{domain!r} is not a registry's host name")
    if not path:
        raise wrong("there is no repository name")
    if path != path.lower():
        raise wrong("repository names are lower case")
    if not _PATH.fullmatch(path):
        raise wrong(f"{path!r} is not a repository name")
    if len(path) > _MAX_NAME:
        raise wrong(f"the repository name is longer than {_MAX_NAME} characters")
    if not colon and not at and domain == DEFAULT_DOMAIN and len(text) == 64 and _HEX.fullmatch(text):
        raise wrong("64 hexadecimal digits would be mistaken for an image's digest")
    return Reference(domain, path, tag if colon else None if at else DEFAULT_TAG, digest if at else None)


def _split_domain(name: str) -> tuple[str, str]:
    """Split like ``splitDockerDomain`` of distribution/reference does."""
    first, slash, rest = name.partition("/")
    is_domain = slash and ("." in first or ":" in first or first == "localhost" or first != first.lower())
    domain, path = (first, rest) if is_domain else (DEFAULT_DOMAIN, name)
    if domain == _LEGACY_DOMAIN:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and path and "/" not in path:
        path = _OFFICIAL + path
    return domain, path
