"""What our own clients and servers say to each other under ``/v1/x``: JSON bodies that mirror `hutch.sdk.base`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from hutch.errors import (
    ExecError,
    HutchError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UpstreamUnavailableError,
    by_code,
)
from hutch.types import BoxSpec, Outbound

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")

_BY_STATUS: Mapping[int, type[HutchError]] = {
    400: InvalidArgumentError,
    401: UnauthenticatedError,
    403: PermissionDeniedError,
    404: NotFoundError,
}


class ConnectionFailed(UpstreamUnavailableError):
    """There was no answer: the request may or may not have been carried out. It may be the next server on the way that
    did not answer: its errors keep this name."""


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The base of request bodies."""


class CreateBody(Body, frozen=True, kw_only=True):
    """``POST /v1/x/boxes``. The same ``id`` twice makes one box."""

    spec: BoxSpec
    id: str | None = None
    pull: Literal["missing", "always", "never"] = "missing"


class StartBody(Body, frozen=True, kw_only=True):
    """``POST …/start``. ``fresh``: only if it does not run, for a watcher with a terminal of this size."""

    fresh: bool = False
    rows: int = 24
    cols: int = 80


class StopBody(Body, frozen=True, kw_only=True):
    """``POST …/stop``."""

    timeout: float = 5.0


class NetworkBody(Body, frozen=True, kw_only=True):
    """``POST …/network``."""

    outbound: Outbound
    allow: tuple[str, ...] = ()


class RatesBody(Body, frozen=True, kw_only=True):
    """``POST …/network/rates``."""

    send_rate: int | None = None
    receive_rate: int | None = None


class SignalBody(Body, frozen=True, kw_only=True):
    """``POST …/kill``, ``POST …/executions/{id}/signal``."""

    signal: int = 9


class NameBody(Body, frozen=True, kw_only=True):
    """``POST …/clone``, ``…/fork``, ``…/snapshots``, ``…/restore``, ``/volumes``."""

    name: str | None = None


class ExecBody(Body, frozen=True, kw_only=True):
    """``POST …/exec``. The client chooses the id, so that a request whose answer was lost can be repeated."""

    id: str
    command: tuple[str, ...] = ()
    env: dict[str, str] = {}
    cwd: str | None = None
    user: str | None = None
    tty: tuple[int, int] | None = None
    stdin: bool = False
    timeout: float | None = None
    kill_after: float = 2.0
    linger: float | None = 0.3
    file_op: int | None = None
    path: str = ""


class NextBody(Body, frozen=True, kw_only=True):
    """A text message on a relay whose execution has ended: start another command of the box, and relay that one, to
    the watcher with this name. The answer, a text message too, is `Launched` or the error envelope."""

    watcher: str
    exec: ExecBody


class Launched(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``POST …/exec``. ``oom_kills``: how often memory had run out in the box before."""

    pid: int
    oom_kills: int | None = None


class PullBody(Body, frozen=True, kw_only=True):
    """``POST /v1/x/images/pull``."""

    reference: str
    platform: str | None = None
    always: bool = False


class BootstrapBody(Body, frozen=True, kw_only=True):
    """``POST /v1/x/images/bootstrap``."""

    flavour: str = "debian"
    reference: str | None = None
    packages: tuple[str, ...] = ()


class TagBody(Body, frozen=True, kw_only=True):
    """``POST /v1/x/images/tag``."""

    reference: str
    name: str


class LoginBody(Body, frozen=True, kw_only=True):
    """``POST /v1/x/logins``."""

    registry: str
    username: str
    password: str
    prefix: str = ""

    def __repr__(self) -> str:
        return f"LoginBody(registry={self.registry!r}, username={self.username!r}, password=…)"


class PruneBody(Body, frozen=True, kw_only=True):
    """``POST /v1/x/images/prune``."""

    all: bool = False


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """``GET /v1/me``: whose key this is, and what it may do."""

    sub: str
    principal_type: str
    scopes: tuple[str, ...]
    path_prefix: str | None = None


class Waited(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``GET …/wait``: whether the box still runs, else the exit code of its main command."""

    running: bool
    exit_code: int | None = None


def dumps(value: object) -> bytes:
    """Encode. Surrogate escapes (bytes of the operating system that are no text) survive, as in Python's own JSON."""
    return json.dumps(msgspec.to_builtins(value), separators=(",", ":")).encode("ascii")


def loads(data: bytes, kind: type[T]) -> T:
    """Decode and check. Raises `InvalidArgumentError` naming the field."""
    try:
        return msgspec.convert(json.loads(data or b"{}"), kind)
    except (ValueError, RecursionError) as error:  # a ValidationError is a ValueError
        raise InvalidArgumentError(f"the body is not valid: {error}") from None


def error_details(error: HutchError) -> dict[str, Any]:
    """What the envelope of an error needs beyond message and code, so that `error_from_body` makes the same one."""
    if isinstance(error, ExecError):
        return {"details": {"command": list(error.command), "cause": error.cause}}
    if isinstance(error, ConnectionFailed):  # of a server to the next one: it may be asked again
        return {"details": {"unanswered": True}}
    return {}


def error_from(status: int, data: bytes) -> HutchError:
    """The error that an answer stands for."""
    try:
        body = json.loads(data)["error"]
        return error_from_body(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = data[:200].decode("utf-8", "replace").strip()
        kind = _BY_STATUS.get(status, UpstreamUnavailableError)
        return kind(f"the server answered {status}{f': {text}' if text else ''}")


def error_from_body(body: Mapping[str, Any]) -> HutchError:
    """The error that the inner object of an envelope stands for."""
    kind, message = by_code(str(body["code"])), str(body["message"])
    details = body.get("details")
    if not isinstance(details, dict):
        return kind(message)
    if details.get("unanswered"):
        return ConnectionFailed(message)
    if issubclass(kind, ExecError):
        command = tuple(map(str, details.get("command", ())))
        return kind(message, command=command, cause=str(details.get("cause", "start_failed")))
    return kind(message)
