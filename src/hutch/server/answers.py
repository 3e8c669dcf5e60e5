"""How the endpoints under ``/v1/x`` answer: at once where it is quick, else with a sign of life every few seconds and
the outcome as the last line. A client that has gone away takes its request with it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import anyio
import anyio.to_thread
import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from hutch.errors import HutchError, InternalError, ResourceExhaustedError
from hutch.sdk.remote_http import STREAM_TYPE
from hutch.sdk.remote_wire import dumps
from hutch.server.envelope import body_of, envelope, request_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from starlette.requests import Request

    from hutch.server.transit import Transit
    from hutch.types import Progress

log = logging.getLogger("hutch.server")

_QUICK_SECONDS = 2.0
_BEAT_SECONDS = 5.0
_STEP_SECONDS = 0.25
_MAX_BODY = 16 << 20
# Steps of progress that may wait to be sent; older ones are of no interest.
_STEPS = 64


class Call:
    """One request: its parameters, its body, and where progress is reported."""

    def __init__(self, request: Request, body: bytes, upload: Path | None) -> None:
        self.path = {name: unquote(value) for name, value in request.path_params.items()}
        self.query = request.query_params
        self.body = body
        self._upload = upload
        self._steps: asyncio.Queue[Progress] = asyncio.Queue()

    @property
    def upload(self) -> Path:
        """The file that was sent."""
        assert self._upload is not None
        return self._upload

    def progress(self, step: Progress) -> None:
        """Report a step."""
        if self._steps.qsize() >= _STEPS:
            self._steps.get_nowait()
        self._steps.put_nowait(step)

    def steps(self) -> list[Progress]:
        """Take what was reported."""
        return [self._steps.get_nowait() for _ in range(self._steps.qsize())]


Handler = Callable[[Call], Awaitable[Any]]


class Endpoint(Route):
    """A route, with what the OpenAPI document tells of it: the types of the body and of the answer (without one: a
    file), the names in the query (``?`` at the end of one that may be left out)."""

    method: str
    summary: str
    takes: Any
    gives: Any
    query: tuple[str, ...]
    upload: bool


def described(
    method: str,
    path: str,
    endpoint: Callable[[Request], Awaitable[Response]],
    summary: str,
    *,
    takes: Any = None,
    gives: Any = None,
    query: tuple[str, ...] = (),
    upload: bool = False,
) -> Endpoint:
    """Make an `Endpoint`."""
    made = Endpoint(path, endpoint, methods=[method], name=f"{method} {path}", include_in_schema=False)
    made.method, made.summary, made.takes, made.gives = method, summary, takes, gives
    made.query, made.upload = query, upload
    return made


def route(
    method: str,
    path: str,
    handler: Handler,
    summary: str,
    *,
    takes: Any = None,
    gives: Any = Any,
    query: tuple[str, ...] = (),
    upload: Transit | None = None,
    lasting: bool = False,
) -> Endpoint:
    """A route whose handler returns what is answered. ``upload``: the body is a file, which goes there. ``lasting``: it
    is carried out even if the client goes away."""

    async def endpoint(request: Request) -> Response:
        try:
            with contextlib.ExitStack() as stack:
                body, file = b"", None
                if upload is not None:
                    file = stack.enter_context(upload.place())
                    await _save(request, file)
                elif method != "GET":
                    body = await _read(request)
                call = Call(request, body, file)
                task = asyncio.ensure_future(_guarded(handler, call))
                kept = stack.pop_all()
                task.add_done_callback(functools.partial(_done, kept))
            return await _answer(request, call, task, lasting=lasting)
        except HutchError as error:
            return envelope(error, request_id(request.scope), details=True)
        except ClientDisconnect:
            return Response(status_code=400)  # for nobody

    described_by = {"takes": takes, "gives": gives, "query": query, "upload": upload is not None}
    return described(method, path, endpoint, summary, **described_by)


async def _answer(request: Request, call: Call, task: asyncio.Task[Any], *, lasting: bool) -> Response:
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), timeout=_QUICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and gone.done() and not lasting:
            task.cancel()
        if task.done():
            return Response(dumps(task.result()), media_type="application/json")
    except BaseException:
        if not lasting:
            task.cancel()
        raise
    finally:
        gone.cancel()
    return StreamingResponse(_lines(call, task, request_id(request.scope), lasting=lasting), media_type=STREAM_TYPE)


async def _lines(call: Call, task: asyncio.Task[Any], number: str, *, lasting: bool) -> AsyncIterator[bytes]:
    try:
        beat = anyio.current_time()
        yield b"\n"
        while not task.done():
            await asyncio.wait((task,), timeout=_STEP_SECONDS)
            lines = b"".join(dumps({"progress": step}) + b"\n" for step in call.steps())
            if lines or anyio.current_time() - beat >= _BEAT_SECONDS:
                beat = anyio.current_time()
                yield lines or b"\n"
        try:
            yield dumps({"result": msgspec.to_builtins(task.result())}) + b"\n"
        except HutchError as error:
            yield dumps(body_of(error, number, details=True)) + b"\n"
    finally:
        if not task.done() and not lasting:  # the client has gone away
            task.cancel()


async def _guarded(handler: Handler, call: Call) -> Any:
    try:
        return await handler(call)
    except HutchError:
        raise
    except Exception:
        log.exception("a request failed")
        raise InternalError("the server failed; its log says why") from None


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_BODY:
            raise ResourceExhaustedError(f"the body is larger than {_MAX_BODY} bytes")
    return bytes(body)


async def _save(request: Request, path: Path) -> None:
    with path.open("wb") as file:
        async for piece in request.stream():
            await anyio.to_thread.run_sync(file.write, piece)


def _done(kept: contextlib.ExitStack, task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # whose client has gone away fails for nobody
    kept.close()
