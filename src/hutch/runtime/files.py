"""Files of a box: they travel as a tar stream through an execution of the agent's own (docs/agent-protocol.md,
"Files").

The box's side runs confined in the box. The host's side writes what it receives below one directory and nowhere
else, whatever the names in the stream are; see `hutch.host.untar`.
"""

from __future__ import annotations

import io
import os
import posixpath
import socket
import sys
import tarfile
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from hutch.core import agentproto as proto
from hutch.core.filelist import parse_listing
from hutch.errors import (
    AlreadyExistsError,
    HutchError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    StorageError,
)
from hutch.host.untar import extract_below
from hutch.runtime.checks import check_bytes, check_path, check_text, check_whole, quoted
from hutch.runtime.execution import DISCARD
from hutch.runtime.tarpipe import PIECE, consume_tar, copy_only_member, feed_tar, first_member, in_thread, pour

if TYPE_CHECKING:
    import builtins
    from collections.abc import AsyncIterable, AsyncIterator, Callable
    from pathlib import Path

    from hutch.runtime.execution import LocalExecution
    from hutch.types import FileInfo, Result

_MAX_LISTING = 256 << 20


class Transfers(Protocol):
    """A box, as far as its files go."""

    async def start_file_op(self, op: proto.FileOp, path: str, **options: Any) -> LocalExecution: ...

    async def dispose(self, execution: Any) -> None: ...


class BoxFiles:
    """The files of one box. Implements `hutch.sdk.base.Files`."""

    def __init__(self, box: Transfers) -> None:
        self._box = box

    async def read(self, path: str, *, max_bytes: int = 64 << 20) -> bytes:
        """Return a file's bytes."""
        check_whole("max_bytes", max_bytes, 0, sys.maxsize)
        buffer = io.BytesIO()

        def consume(stream: tarfile.TarFile) -> None:
            member = stream.next()
            if member is not None and member.isdir():
                raise InvalidArgumentError(f"{path} is a directory; use get to copy it, or list to see what it holds")
            content = stream.extractfile(member) if member is not None and member.isreg() else None
            if content is None:
                raise InvalidArgumentError(f"{path} is not a file")
            while piece := content.read(PIECE):
                if buffer.tell() + len(piece) > max_bytes:
                    raise ResourceExhaustedError(f"{path} is larger than the limit of {max_bytes} bytes; use get")
                buffer.write(piece)

        await self._receive(path, consume)
        return buffer.getvalue()

    async def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Create or replace a file, atomically; missing parent directories are made."""
        try:
            content = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(f"the text for {quoted(path)} cannot be written as UTF-8: {error}") from None
        check_bytes("data", content)
        check_whole("mode", mode, 0, 0o7777)
        parent, name = posixpath.split(check_text("the path", path))
        if not name or name in (".", ".."):
            raise InvalidArgumentError(f"{path!r} is not the name of a file")
        parent = parent or "."
        info = tarfile.TarInfo(name)
        info.size = memoryview(content).nbytes
        info.mode = mode
        info.mtime = _now()
        await self._make_parents(parent)
        await self._send(parent, lambda stream: stream.addfile(info, io.BytesIO(content)))

    async def put(
        self, source: str | Path, target: str, *, overwrite: bool = True, follow_symlinks: bool = False
    ) -> None:
        """Copy a host file or directory into the box. See `hutch.sdk.base.Files.put`."""
        path = check_path("the source", source)
        check_text("the target", target)
        if not os.path.lexists(path):
            raise NotFoundError(f"{path} does not exist on the host")
        parent, name = await self._destination(target, path.name or path.resolve().name)
        if not overwrite and await self._exists(posixpath.join(parent, name)):
            raise AlreadyExistsError(f"{posixpath.join(parent, name)} exists in the box already")

        def produce(stream: tarfile.TarFile) -> None:
            stream.dereference = follow_symlinks
            stream.add(path, arcname=name, filter=_portable)

        await self._make_parents(parent)
        await self._send(parent, produce)

    async def get(self, source: str, target: str | Path, *, overwrite: bool = True) -> None:
        """Copy a file or directory of the box to the host. See `hutch.sdk.base.Files.get`."""
        path = check_path("the target", target)
        check_text("the source", source)
        name = posixpath.basename(posixpath.normpath(source)) or "root"
        if path.is_dir() or str(target).endswith("/"):
            parent = path
            if not path.is_dir():
                raise NotFoundError(f"the directory {path} does not exist on the host")
        else:
            parent, name = path.parent, path.name
            if not parent.is_dir():
                raise NotFoundError(f"the directory {parent} does not exist on the host")
        if not overwrite and os.path.lexists(parent / name):
            raise AlreadyExistsError(f"{parent / name} exists on the host already")
        await self._receive(source, lambda stream: extract_below(stream, parent, name))

    async def put_tar(self, archive: AsyncIterable[bytes], target: str, *, is_directory: bool) -> None:
        """Unpack an uncompressed tar stream in the box: below ``target``, a directory that is made; or, if not
        ``is_directory``, its only entry as ``target`` (into it, if that is a directory or ends in ``/``)."""
        if not check_text("the target", target):
            raise InvalidArgumentError("the target is empty")
        if is_directory:
            await self._make_parents(target)
            await self._send_raw(target, archive)
            return
        ours, theirs = socket.socketpair()
        failures: builtins.list[Exception] = []
        with ours, theirs:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pour, archive, theirs, failures)
                try:
                    await self._put_only_member(ours, target)
                except HutchError as error:
                    failures.append(error)
                finally:
                    ours.shutdown(socket.SHUT_RDWR)  # the end for whoever pours, also when we fail
        for failure in failures:
            raise failure

    async def get_tar(self, source: str) -> AsyncIterator[bytes]:
        """A tar stream of a file or directory, whose first entry is named as its last component. An error may come
        after the first bytes."""
        errors = io.BytesIO()
        execution = await self._box.start_file_op(proto.FileOp.GET, source, sinks={proto.STDERR: errors}, linger=None)
        try:
            async for piece in execution.stdout:
                yield piece
            _check(await execution.wait(), source, errors.getvalue())
        finally:
            with anyio.CancelScope(shield=True):
                await self._box.dispose(execution)

    async def list(self, path: str) -> list[FileInfo]:
        """List a directory, by name."""
        found = await self._query(proto.FileOp.LIST, path)
        return sorted(found, key=lambda info: info.name)

    async def stat(self, path: str) -> FileInfo:
        """Describe one file; of a symlink, the link itself."""
        found = await self._query(proto.FileOp.STAT, path)
        if len(found) != 1:
            raise HutchError(f"the box's agent gave {len(found)} answers about {path}")
        return found[0]

    # Private methods.

    async def _query(self, op: proto.FileOp, path: str) -> builtins.list[FileInfo]:
        execution = await self._box.start_file_op(op, path, collect=_MAX_LISTING)
        try:
            result = await execution.wait_with_agent()
        finally:
            await self._box.dispose(execution)
        _check(result, path)
        if result.truncated:
            raise ResourceExhaustedError(f"{path} has too many entries to list")
        return parse_listing(result.stdout)

    async def _exists(self, path: str) -> bool:
        try:
            await self.stat(path)
        except NotFoundError:
            return False
        return True

    async def _destination(self, target: str, name: str) -> tuple[str, str]:
        if target.endswith("/"):
            return target, name
        try:
            await self.stat(target + "/.")  # through a symlink as well
            return target, name
        except (NotFoundError, InvalidArgumentError):
            pass
        parent, base = posixpath.split(target)
        if base in ("", ".", ".."):
            raise InvalidArgumentError(f"{target!r} is not a name in the box")
        return parent or ".", base

    async def _make_parents(self, path: str) -> None:
        missing: list[str] = []
        head = path.rstrip("/") or "/"
        while head not in ("/", ".", "") and not await self._exists(head):
            head, name = posixpath.split(head)
            missing.append(name)
        if not missing:
            return

        def produce(stream: tarfile.TarFile) -> None:
            built = ""
            for name in reversed(missing):
                built = posixpath.join(built, name)
                info = tarfile.TarInfo(built)
                info.type = tarfile.DIRTYPE
                info.mode = 0o755
                info.mtime = _now()
                stream.addfile(info)

        await self._send(head or ".", produce)

    async def _send(self, directory: str, produce: Callable[[tarfile.TarFile], None]) -> None:
        """Stream a tar that ``produce`` writes (in a thread) to the agent, which unpacks it below the directory."""
        execution = await self._box.start_file_op(proto.FileOp.PUT, directory, stdin=True, collect=PIECE, linger=None)
        failures: builtins.list[Exception] = []
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(feed_tar, execution, produce, failures)
                result, broken = await _outcome(execution)
                tasks.cancel_scope.cancel()  # nobody reads what is left
        finally:
            with anyio.CancelScope(shield=True):
                await self._box.dispose(execution)
        for failure in failures:
            raise _named(failure, "the source")
        if broken is not None:
            raise _named(broken, directory)
        if result is not None:
            _check(result, directory)

    async def _send_raw(self, directory: str, archive: AsyncIterable[bytes]) -> None:
        """Stream a tar as it is: the agent unpacks nothing outside of the directory, whatever it says."""
        execution = await self._box.start_file_op(proto.FileOp.PUT, directory, stdin=True, collect=PIECE, linger=None)
        try:
            async for piece in archive:
                if execution.input_closed:
                    break
                await execution.stdin.write(piece)
            await execution.stdin.close()
            _check(await execution.wait(), directory)
        finally:
            with anyio.CancelScope(shield=True):
                await self._box.dispose(execution)

    async def _put_only_member(self, source: socket.socket, target: str) -> None:
        """Put the one member of the archive that comes from a socket to the target."""
        with source.makefile("rb", buffering=PIECE) as file:
            stream, member = await in_thread(first_member, file)
            with stream:
                parent, member.name = await self._destination(target, posixpath.basename(member.name))
                member.pax_headers = {}
                await self._make_parents(parent)
                await self._send(parent, lambda out: copy_only_member(stream, member, out))

    async def _receive(self, path: str, consume: Callable[[tarfile.TarFile], None]) -> None:
        """Let ``consume`` (in a thread) read the tar that the agent makes of a path."""
        ours, theirs = socket.socketpair()
        errors = io.BytesIO()
        failure: Exception | None = None

        async def read() -> None:
            nonlocal failure
            try:
                await in_thread(consume_tar, ours, consume)
            except Exception as error:  # what comes from the box may break any reader in any way
                failure = error

        with ours, theirs, theirs.makefile("wb", buffering=0) as sink:
            execution = await self._box.start_file_op(
                proto.FileOp.GET, path, sinks={proto.STDOUT: sink, proto.STDERR: errors}, linger=None
            )
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read)
                    try:
                        result, broken = await _outcome(execution)
                    finally:
                        theirs.shutdown(socket.SHUT_RDWR)  # the end for the reader, also when we are cancelled
            finally:
                with anyio.CancelScope(shield=True):
                    await self._box.dispose(execution)
        if result is not None:
            _check(result, path, errors.getvalue())
        for error in (broken, failure):  # in this order: a stream that breaks off breaks its reader too
            if error is not None:
                raise _named(error, path)


async def _outcome(execution: LocalExecution) -> tuple[Result | None, Exception | None]:
    try:
        return await execution.wait_with_agent(), None
    except BrokenPipeError:  # the reader has given up, and says why
        return None, None
    except (HutchError, OSError) as error:
        return None, error


def _check(result: Result, path: str, errors: bytes = b"") -> None:
    if result.exit_code == 0:
        return
    message = (result.stderr or errors).decode("utf-8", "replace").strip()[
        :500
    ] or f"{path}: exit code {result.exit_code}"
    if result.exit_code == 2:
        raise NotFoundError(message)
    if "ermission denied" in message or "not permitted" in message:
        raise PermissionDeniedError(message)
    if "No space left" in message or "Disk quota" in message:
        raise ResourceExhaustedError(message)
    if result.exit_code < 0:
        raise StorageError(f"{path}: the transfer was ended by signal {-result.exit_code} ({message})")
    raise InvalidArgumentError(message)


def _named(error: Exception, path: str) -> Exception:
    if isinstance(error, HutchError):
        return error
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f"{path}: {error}")
    return StorageError(f"{path}: {error}")


def _portable(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The host's owners mean nothing in the box, and its special files have no business there."""
    if not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
        return None
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def _now() -> float:
    import time

    return time.time()


__all__ = ["DISCARD", "BoxFiles"]
