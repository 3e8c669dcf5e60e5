"""Bodies of requests: how large they may be, and how long they may take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import anyio

from hutch.server.envelope import PayloadTooLargeError, SlowClientError, envelope

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

    from hutch.errors import HutchError


class Body:
    """Receives the body of one request. ``limit``: of its size in bytes; ``seconds``: for all of it; ``stall``: for
    each piece of it.

    What it raises is the answer to the request, whatever the application makes of it: see `answering`.
    """

    def __init__(
        self, receive: Receive, *, limit: float = math.inf, seconds: float = math.inf, stall: float = math.inf
    ) -> None:
        self._receive = receive
        self._limit = limit
        self._deadline = anyio.current_time() + seconds
        self._stall = stall
        self._size = 0
        self._complete = False
        self._refusal: HutchError | None = None

    async def receive(self) -> Message:
        """The next message. Raises `PayloadTooLargeError` and `SlowClientError`."""
        with anyio.CancelScope() as scope:
            if not self._complete:
                scope.deadline = min(self._deadline, anyio.current_time() + self._stall)
            message = await self._receive()
        if scope.cancelled_caught:
            raise self._refuse(SlowClientError("the body of the request did not come in time"))
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._limit:
            raise self._refuse(PayloadTooLargeError(f"the body is larger than the limit of {self._limit} bytes"))
        return message

    def answering(self, scope: Scope, send: Send, number: str) -> Send:
        """What the application sends its answer to."""
        replaced = False

        async def answer(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and self._refusal is not None:
                replaced = True
                response = envelope(self._refusal, number, headers={"connection": "close"})
                await response(scope, self._receive, send)
            elif not replaced:
                await send(message)

        return answer

    def _refuse(self, error: HutchError) -> HutchError:
        self._refusal = error
        return error
