"""The secrets of boxes: sealed in their records, known to the gateway alone, and a placeholder to the box.

The key is a file of the home. So a copied database gives nothing away; whoever can read the whole home can use what
is in it.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import msgspec

from hutch.core.secrets import Authority, placeholder
from hutch.errors import NotFoundError, StorageError
from hutch.runtime.files import BoxFiles

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from cryptography.fernet import Fernet

    from hutch.core.agentproto import FileOp
    from hutch.runtime.box import LocalBox
    from hutch.runtime.execution import LocalExecution
    from hutch.types import BoxSpec, Secret

BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_OTHER_BUNDLES = ("/etc/ssl/cert.pem", "/etc/pki/tls/certs/ca-bundle.crt")
_OWN = "/usr/local/share/ca-certificates/hutch.crt"
_MOST_BUNDLE = 8 << 20
# What the common clients look at for more or other authorities than their own.
_VARIABLES = {
    "SSL_CERT_FILE": BUNDLE,
    "REQUESTS_CA_BUNDLE": BUNDLE,
    "CURL_CA_BUNDLE": BUNDLE,
    "GIT_SSL_CAINFO": BUNDLE,
    "NODE_EXTRA_CA_CERTS": _OWN,
}


class Contents(msgspec.Struct, frozen=True):
    """What is sealed in a record: values by name, and the box's certificate authority."""

    values: dict[str, str]
    authority: Authority

    def __repr__(self) -> str:
        return "Contents(…)"


class Vault:
    """Seals and opens, with the key of one home."""

    def __init__(self, home: Path) -> None:
        self._path = home / "secrets.key"

    def seal(self, secrets: Iterable[Secret], box_id: str) -> bytes:
        """Return the secrets with a new authority of the box, readable with the home's key alone. Raises
        `StorageError`."""
        from hutch.net.authority import create

        contents = Contents({secret.name: secret.value for secret in secrets}, create(box_id))
        return self._cipher().encrypt(msgspec.json.encode(contents))

    def open(self, sealed: bytes) -> Contents:
        """Undo `seal`. Raises `StorageError` when the home's key is another one."""
        from cryptography.fernet import InvalidToken

        try:
            return msgspec.json.decode(self._cipher().decrypt(sealed), type=Contents)
        except InvalidToken:
            raise StorageError(
                f"the secrets of a box cannot be opened: {self._path} is not the key that they were sealed with"
            ) from None

    def _cipher(self) -> Fernet:
        from cryptography.fernet import Fernet

        try:
            with contextlib.suppress(FileExistsError):
                fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with open(fd, "wb") as file:
                    file.write(Fernet.generate_key())
            return Fernet(self._path.read_bytes())
        except (OSError, ValueError) as error:
            raise StorageError(f"the key of the secrets, {self._path}, cannot be used: {error}") from error


def without_values(spec: BoxSpec) -> BoxSpec:
    """Return the specification as it may be stored and shown."""
    secrets = tuple(msgspec.structs.replace(secret, value="") for secret in spec.secrets)
    return msgspec.structs.replace(spec, secrets=secrets)


def environment(spec: BoxSpec, env: dict[str, str]) -> dict[str, str]:
    """Return the environment of a box, with the placeholders of its secrets if it has some."""
    if not spec.secrets:
        return env
    return _VARIABLES | env | {secret.name: placeholder(secret) for secret in spec.secrets}


class _AsRoot:
    """A box whose files are its root's business, whoever its user is."""

    def __init__(self, box: LocalBox) -> None:
        self._box = box
        self.dispose = box.dispose

    async def start_file_op(self, op: FileOp, path: str, **options: Any) -> LocalExecution:
        return await self._box.start_file_op(op, path, user="0", cwd="/", **options)


async def install(box: LocalBox, certificate: str) -> None:
    """Let the programs of a running box trust its authority. Idempotent."""
    own = certificate.encode()
    files = BoxFiles(_AsRoot(box))
    await files.write(_OWN, own)
    for path in (BUNDLE, *_OTHER_BUNDLES):
        before = bundle = await _read(files, path)
        if path == BUNDLE and not bundle:
            # Clients are told to look here, so whom the image trusts elsewhere must be here, too.
            others = [await _read(files, other) for other in _OTHER_BUNDLES]
            bundle = next(filter(None, others), b"")
        if bundle is not None and own not in bundle:
            bundle = bundle.rstrip(b"\n") + b"\n" + own if bundle else own
        if bundle != before and bundle is not None:
            await files.write(path, bundle)


async def _read(files: BoxFiles, path: str) -> bytes | None:
    with contextlib.suppress(NotFoundError):
        return await files.read(path, max_bytes=_MOST_BUNDLE)
    return None
