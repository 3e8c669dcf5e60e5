"""Requests that are safe to repeat: the same `Idempotency-Key` gives the same answer, and the work is done once.

The answers are kept in memory: a server that was started anew knows of none.
"""

from __future__ import annotations

import hashlib
import re
import time
from typing import TYPE_CHECKING

import anyio

from hutch.errors import HutchError, InvalidArgumentError
from hutch.server.envelope import KeyReusedError, envelope, request_id

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"idempotency-key"
_KEY = re.compile(rb"[A-Za-z0-9_-]{8,128}\Z")
# The operations whose repetition would do something else than the first time.
_PATHS = re.compile(
    r"/v1/(boxes|volumes|boxes/[^/]+(/(start|stop|exec|clone|snapshots|executions/[^/]+(/signal)?))?)\Z"
)
_MOST = 10_000
_MAX_ANSWER = 64 << 10


class _Answer:
    """One request that was made with a key, and its answer once it is there."""

    def __init__(self, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        self.at = time.monotonic()
        self.ready = anyio.Event()
        self.messages: list[Message] = []
        self.valid = False

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"]) if self.messages else 0


class Idempotency:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app = app
        self._seconds = seconds
        self._answers: dict[tuple[str, bytes], _Answer] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = _key(scope)
        if key is None:
            await self._app(scope, receive, send)
            return
        try:
            body = await _body(scope, receive, key)
            answer = await self._answer((scope["hutch.principal"], key), scope, body)
        except HutchError as error:
            await envelope(error, request_id(scope))(scope, receive, send)
            return
        for message in answer.messages:
            await send(message)

    async def _answer(self, name: tuple[str, bytes], scope: Scope, body: bytes) -> _Answer:
        fingerprint = _fingerprint(scope, body)
        while (known := self._answers.get(name)) is not None and time.monotonic() - known.at < self._seconds:
            if known.fingerprint != fingerprint:
                raise KeyReusedError("Idempotency-Key: it was used for another request; make a new one")
            await known.ready.wait()
            if known.valid:
                return known
        answer = self._answers[name] = _Answer(fingerprint)
        try:
            await self._app(scope, _given(body), _kept(answer))
            # What failed on our side may well succeed the next time.
            answer.valid = (
                0 < answer.status < 500 and sum(len(m.get("body", b"")) for m in answer.messages) < _MAX_ANSWER
            )
        finally:
            answer.ready.set()
            if not answer.valid and self._answers.get(name) is answer:
                del self._answers[name]
        self._forget()
        return answer

    def _forget(self) -> None:
        horizon = time.monotonic() - self._seconds
        for name, answer in list(self._answers.items()):  # oldest first
            if answer.at >= horizon and len(self._answers) <= _MOST:
                return
            if answer.ready.is_set():
                del self._answers[name]


def _key(scope: Scope) -> bytes | None:
    if scope["type"] != "http" or scope["method"] not in ("POST", "DELETE") or not _PATHS.match(scope["path"]):
        return None
    return next((value for name, value in scope["headers"] if name == HEADER), None)


async def _body(scope: Scope, receive: Receive, key: bytes) -> bytes:
    if not _KEY.match(key):
        raise InvalidArgumentError("Idempotency-Key: it must be 8 to 128 letters, digits, '-' or '_', such as a UUID")
    body = b""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidArgumentError("the client went away before its request was complete")
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _fingerprint(scope: Scope, body: bytes) -> bytes:
    parts = (scope["method"].encode(), scope["path"].encode(), scope["query_string"], body)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def _given(body: bytes) -> Receive:
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await anyio.sleep_forever()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _kept(answer: _Answer) -> Send:
    async def send(message: Message) -> None:
        answer.messages.append(message)

    return send
