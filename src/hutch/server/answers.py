"""How the endpoints under ``/v1/x`` answer: at once where it is quick, else with a sign of life every few seconds and
the outcome as the last line. A client that has gone away takes its request with it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
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
from hutch.sdk.remote_wire import dumps, error_body

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

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


def route(method: str, path: str, handler: Handler, *, upload: bool = False, lasting: bool = False) -> Route:
    """A route. ``upload``: the body is a file. ``lasting``: it is carried out even if the client goes away."""

    async def endpoint(request: Request) -> Response:
        folder = await anyio.to_thread.run_sync(tempfile.mkdtemp, "", "hutch-upload-") if upload else None
        started = False
        try:
            body, file = b"", None
            if folder is not None:
                file = Path(folder) / "file"
                await _save(request, file)
            elif method != "GET":
                body = await _read(request)
            call = Call(request, body, file)
            task = asyncio.ensure_future(_guarded(handler, call))
            task.add_done_callback(functools.partial(_done, folder))
            started = True
            return await _answer(request, call, task, lasting=lasting)
        except HutchError as error:
            return Response(dumps(error_body(error)), error.status, media_type="application/json")
        except ClientDisconnect:
            return Response(status_code=400)  # for nobody
        finally:
            if not started:
                _remove(folder)

    return Route(path, endpoint, methods=[method], name=f"{method} {path}", include_in_schema=False)


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
    return StreamingResponse(_lines(call, task, lasting=lasting), media_type=STREAM_TYPE)


async def _lines(call: Call, task: asyncio.Task[Any], *, lasting: bool) -> AsyncIterator[bytes]:
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
            yield dumps(error_body(error)) + b"\n"
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


def _done(folder: str | None, task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # whose client has gone away fails for nobody
    _remove(folder)


def _remove(folder: str | None) -> None:
    if folder is not None:
        with contextlib.suppress(FileNotFoundError):
            (Path(folder) / "file").unlink()
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
