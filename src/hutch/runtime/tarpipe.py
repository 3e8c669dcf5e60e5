"""Tar streams between threads that make or read them and the event loop that moves them."""

from __future__ import annotations

import contextlib
import functools
import posixpath
import socket
import tarfile
from typing import IO, TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from hutch.errors import HutchError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable

    from hutch.runtime.execution import LocalExecution

_T = TypeVar("_T")

PIECE = 256 * 1024


async def feed_tar(
    execution: LocalExecution, produce: Callable[[tarfile.TarFile], None], failures: list[Exception]
) -> None:
    """Raises nothing: what is wrong with the source goes to ``failures``, the rest is told by the execution's end."""
    ours, theirs = socket.socketpair()

    async def write() -> None:
        try:
            await in_thread(produce_tar, theirs, produce)
        except (BrokenPipeError, ConnectionResetError):  # the box gave up: its error message tells
            pass
        except (OSError, ValueError, tarfile.TarError, HutchError) as error:
            failures.append(error)

    with ours, theirs, contextlib.suppress(HutchError):
        ours.setblocking(False)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            try:
                with contextlib.suppress(HutchError):  # of the standard input
                    while (data := await _read(ours)) and not execution.input_closed:
                        await execution.stdin.write(data)
            finally:
                ours.shutdown(socket.SHUT_RDWR)  # the end for the writer, also when we are cancelled
        if failures:
            # Without its end the archive is refused, so nothing half is left under a final name.
            await execution.kill()
        else:
            await execution.stdin.close()


async def pour(archive: AsyncIterable[bytes], target: socket.socket, failures: list[Exception]) -> None:
    """Write a stream to a socket, whose closing is its end. What is wrong with the stream goes to ``failures``."""
    target.setblocking(False)
    try:
        async for piece in archive:
            view = memoryview(piece)
            while view:
                try:
                    view = view[target.send(view) :]
                except BlockingIOError:
                    await anyio.wait_writable(target)
    except (BrokenPipeError, ConnectionResetError):  # the reader gave up, and says why
        pass
    except Exception as error:
        failures.append(error)
    finally:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def first_member(file: IO[bytes]) -> tuple[tarfile.TarFile, tarfile.TarInfo]:
    try:
        stream = tarfile.open(fileobj=file, mode="r|", bufsize=PIECE)  # noqa: SIM115  # the caller closes it
        member = stream.next()
    except tarfile.TarError as error:
        raise InvalidArgumentError(f"what was sent is not a tar archive: {error}") from None
    if member is None:
        raise InvalidArgumentError("the archive is empty")
    if not (member.isreg() or member.issym()) or posixpath.basename(member.name) in ("", ".", ".."):
        raise InvalidArgumentError(f"the archive's entry {member.name!r:.100} is not a file")
    return stream, member


def copy_only_member(stream: tarfile.TarFile, member: tarfile.TarInfo, out: tarfile.TarFile) -> None:
    out.addfile(member, stream.extractfile(member) if member.isreg() else None)
    if (other := stream.next()) is not None:
        raise InvalidArgumentError(f"the archive has more entries than one: {other.name!r:.100}")


async def in_thread(function: Callable[..., _T], *args: object) -> _T:
    """Run a function that may wait for a box, in a thread that is not one of those that others need."""
    return await anyio.to_thread.run_sync(functools.partial(function, *args), limiter=anyio.CapacityLimiter(1))


async def _read(source: socket.socket) -> bytes:
    while True:
        try:
            return source.recv(PIECE)
        except BlockingIOError:
            await anyio.wait_readable(source)


def produce_tar(target: socket.socket, produce: Callable[[tarfile.TarFile], None]) -> None:
    try:
        with (
            target.makefile("wb", buffering=PIECE) as file,
            tarfile.open(fileobj=file, mode="w|", bufsize=PIECE, format=tarfile.PAX_FORMAT) as stream,
        ):
            produce(stream)
    finally:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def consume_tar(source: socket.socket, consume: Callable[[tarfile.TarFile], None]) -> None:
    try:
        with source.makefile("rb", buffering=PIECE) as file:
            with tarfile.open(fileobj=file, mode="r|", bufsize=PIECE) as stream:
                consume(stream)
            while file.read(PIECE):  # up to the end, so that the box's side ends well
                pass
    finally:
        with contextlib.suppress(OSError):
            source.shutdown(socket.SHUT_RDWR)
