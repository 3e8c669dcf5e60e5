"""The one error tree of Hutch.

    HutchError
     ├── InvalidArgumentError      invalid_argument      400
     ├── UnsupportedError          unsupported           400
     ├── UnauthenticatedError      unauthenticated       401
     ├── PermissionDeniedError     permission_denied     403
     ├── NotFoundError             not_found             404
     ├── AlreadyExistsError        already_exists        409
     ├── InvalidStateError         invalid_state         409
     │    └── RuntimeClosedError   invalid_state         409   carries what had arrived
     ├── StoppedError              stopped               409
     ├── SessionReapedError        session_reaped        410
     ├── ImageError                image_pull_failed     422
     ├── ExecError                 execution_failed      422
     ├── ResourceExhaustedError    resource_exhausted    429
     ├── NetworkError              network_unavailable   503
     ├── UpstreamUnavailableError  upstream_unavailable  503
     ├── EngineError               engine_unavailable    503
     ├── StorageError              storage_error         500
     ├── DatabaseError             database_error        500
     ├── MetadataError             metadata_error        500
     ├── ConfigError               config_error          500
     ├── InternalError             internal              500
     └── DeadlineError             timeout               504

Each class has a stable ``code`` and the HTTP ``status`` that the server derives from it. A message names the thing,
the cause and, where there is one, the way out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class HutchError(Exception):
    """The root of all errors that Hutch raises on purpose."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    @property
    def message(self) -> str:
        """The text for people."""
        return str(self)


class InvalidArgumentError(HutchError):
    """A value that was given is malformed or out of range."""

    code = "invalid_argument"
    status = 400


class UnsupportedError(HutchError):
    """The request makes sense but this build, engine or machine cannot do it."""

    code = "unsupported"
    status = 400


class UnauthenticatedError(HutchError):
    """No credential, or one that is not accepted."""

    code = "unauthenticated"
    status = 401


class PermissionDeniedError(HutchError):
    """The credential or the operating system does not allow it."""

    code = "permission_denied"
    status = 403


class NotFoundError(HutchError):
    """The named box, image, execution, snapshot, volume or file does not exist."""

    code = "not_found"
    status = 404


class AlreadyExistsError(HutchError):
    """The name is taken."""

    code = "already_exists"
    status = 409


class InvalidStateError(HutchError):
    """The thing exists but is in a state that does not allow the operation."""

    code = "invalid_state"
    status = 409


class RuntimeClosedError(InvalidStateError):
    """The runtime was closed while the caller waited.

    ``exit_code`` is the reaped exit code, if it was known; ``stdout`` and ``stderr`` are what had arrived in
    collecting sinks.
    """

    def __init__(self, message: str, *, exit_code: int | None = None, stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr


class StoppedError(HutchError):
    """The box was stopped by someone, so it does not start by itself."""

    code = "stopped"
    status = 409


class SessionReapedError(HutchError):
    """The execution existed; its log has been released."""

    code = "session_reaped"
    status = 410


class ImageError(HutchError):
    """An image could not be pulled, read, verified or unpacked."""

    code = "image_pull_failed"
    status = 422


class ExecError(HutchError):
    """A command could not be started. ``command`` is its argument vector, ``cause`` a short stable word."""

    code = "execution_failed"
    status = 422

    def __init__(self, message: str, *, command: Sequence[str] = (), cause: str = "start_failed") -> None:
        super().__init__(message)
        self.command = tuple(command)
        self.cause = cause


class ResourceExhaustedError(HutchError):
    """A limit or quota is used up."""

    code = "resource_exhausted"
    status = 429


class NetworkError(HutchError):
    """The network that is needed is not there."""

    code = "network_unavailable"
    status = 503


class UpstreamUnavailableError(HutchError):
    """The agent in the box, a runner or another component does not answer."""

    code = "upstream_unavailable"
    status = 503


class EngineError(HutchError):
    """The isolation engine failed or is missing something on this machine."""

    code = "engine_unavailable"
    status = 503


class StorageError(HutchError):
    """Reading or writing the home directory failed."""

    code = "storage_error"
    status = 500


class DatabaseError(HutchError):
    """The record database failed."""

    code = "database_error"
    status = 500


class MetadataError(HutchError):
    """A stored record cannot be understood."""

    code = "metadata_error"
    status = 500


class ConfigError(HutchError):
    """The configuration is unusable."""

    code = "config_error"
    status = 500


class InternalError(HutchError):
    """A defect in Hutch."""

    code = "internal"
    status = 500


class DeadlineError(HutchError):
    """The operation did not finish within the time that it was given."""

    code = "timeout"
    status = 504


def _subclasses(cls: type[HutchError]) -> list[type[HutchError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in _subclasses(child))]


def by_code(code: str) -> type[HutchError]:
    """Return the class for a stable code (``InternalError`` for one that is not known)."""
    for cls in _subclasses(HutchError)[1:]:
        if cls.code == code:
            return cls
    return InternalError
