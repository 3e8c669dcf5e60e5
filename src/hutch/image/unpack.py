"""From compressed bytes to an unpacked layer, without a file in between.

    source (event loop) ─► queue ─► thread: digest, decompress, diff id ─► pipe ─► box-agent unpack (chrooted child)

Receiving, hashing and writing files overlap. The child is the boundary against hostile archives; what it made counts
only after all digests are right.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread
import msgspec

from hutch.errors import ImageError, ResourceExhaustedError
from hutch.image._tasks import together
from hutch.image.decompress import Decoder
from hutch.image.helper import ENVIRONMENT, unpack_argv

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from pathlib import Path
    from typing import Self

    from anyio.abc import ByteReceiveStream, Process
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

    from hutch.image.config import RegistryConfig

_PIPE_SIZE: Final = 1 << 20
_QUEUE: Final = 8
"""Chunks between the source and the thread; with the chunk size this bounds the memory of a layer."""
_REPORT: Final = re.compile(rb"entries=(\d+) bytes=(\d+)\n")
_TAR_BLOCK: Final = 512
_MAX_REPORT: Final = 4096
_LIMIT: Final = re.compile(r"archive has more than \d+ entries|content is larger than \d+ bytes")
"""How the child names a limit that is exceeded."""


class Blob(msgspec.Struct, frozen=True, kw_only=True):
    """What is known beforehand of the bytes; empty or ``None`` where nothing is."""

    digest: str = ""
    size: int | None = None
    diff_id: str = ""

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.digest or self.diff_id or "of the archive"


class Unpacked(msgspec.Struct, frozen=True, kw_only=True):
    """A layer that is right. ``size``: bytes of content."""

    diff_id: str
    entries: int
    size: int


async def unpack_blob(
    chunks: AsyncGenerator[bytes],
    blob: Blob,
    target: Path,
    *,
    config: RegistryConfig,
    received: Callable[[int], None] = lambda count: None,
) -> Unpacked:
    """Unpack the bytes into ``target``, an empty folder. On failure the caller deletes it.

    ``received`` is called with the number of compressed bytes so far.

    Raises `ImageError`, or `ResourceExhaustedError` when the layer exceeds a limit.
    """
    argv = unpack_argv(target, max_bytes=config.max_layer_bytes, max_entries=config.max_layer_entries)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    with _Feed(blob, write_end, config.max_layer_bytes) as feed:
        try:
            with suppress(OSError):  # beyond what an ordinary user may have: then it is just slower
                fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            process = await anyio.open_process(argv, stdin=read_end, env=ENVIRONMENT, start_new_session=True)
        finally:
            os.close(read_end)
        out, err = bytearray(), bytearray()

        async def pump() -> None:
            send, receive = anyio.create_memory_object_stream[bytes](_QUEUE)
            try:
                await together(lambda: _produce(chunks, feed, send, received), lambda: _consume(receive, feed))
            except BrokenPipeError:
                feed.cut = True  # the child has gone, and says why on its standard error
            finally:
                feed.close()

        async with process:
            await together(
                pump,
                lambda: _collect(process.stdout, out),
                lambda: _collect(process.stderr, err),
                lambda: _guard(process),
            )
    return _judge(feed, process.returncode, bytes(out), bytes(err))


async def _produce(
    chunks: AsyncGenerator[bytes],
    feed: _Feed,
    send: MemoryObjectSendStream[bytes],
    received: Callable[[int], None],
) -> None:
    async with send, aclosing(chunks):
        async for chunk in chunks:
            received(feed.account(len(chunk)))
            await send.send(chunk)


async def _consume(receive: MemoryObjectReceiveStream[bytes], feed: _Feed) -> None:
    async with receive:
        async for chunk in receive:
            await anyio.to_thread.run_sync(feed.write, chunk)
    await anyio.to_thread.run_sync(feed.finish)


async def _collect(stream: ByteReceiveStream | None, into: bytearray) -> None:
    if stream is not None:
        async for chunk in stream:
            into += chunk[: _MAX_REPORT - len(into)]


async def _guard(process: Process) -> None:
    """Wait for the child; end it when we are cancelled: a thread may be waiting for it to read."""
    try:
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()


class _Feed:
    """The thread's side: hashes, decompresses, writes to the pipe."""

    def __init__(self, blob: Blob, fd: int, max_bytes: int) -> None:
        self.blob = blob
        self.cut = False
        """The child ended before it was given everything."""
        self._fd = fd
        self._max_bytes = max_bytes
        self._received = 0
        self._plain = 0
        self._decoder = Decoder()
        self._compressed_hash = hashlib.new(blob.digest.partition(":")[0] or "sha256")
        self._plain_hash = hashlib.new(blob.diff_id.partition(":")[0] or "sha256")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the child the end of its input. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def account(self, count: int) -> int:
        """Count compressed bytes that arrived; return how many there are."""
        self._received += count
        size = self.blob.size
        if size is not None and self._received > size:
            raise ImageError(f"layer {self.blob.name} is longer than the {size} bytes that the manifest says")
        return self._received

    def write(self, chunk: bytes) -> None:
        """Process one chunk. Raises `BrokenPipeError` when the child has gone."""
        self._compressed_hash.update(chunk)
        self._pass_on(self._decoder.feed(chunk))

    def finish(self) -> None:
        """Check that what arrived is what the manifest and the config name."""
        blob = self.blob
        if blob.size is not None and self._received != blob.size:
            raise ImageError(f"layer {blob.digest} has {self._received} bytes, the manifest says {blob.size}")
        digest = _digest(self._compressed_hash)
        if blob.digest and digest != blob.digest:
            raise ImageError(f"layer {blob.digest}: the content has the digest {digest}")
        self._pass_on(self._decoder.finish())
        if blob.diff_id:
            if self.diff_id != blob.diff_id:
                raise ImageError(f"layer {blob.diff_id}: the uncompressed content has the digest {self.diff_id}")
            # Some tools (umoci) leave out the end of the archive and even the padding of its last member. The digest
            # proves that nothing else is missing.
            self._write(bytes(-self._plain % _TAR_BLOCK))

    @property
    def diff_id(self) -> str:
        """The digest of the uncompressed bytes so far."""
        return _digest(self._plain_hash)

    def _pass_on(self, pieces: Iterator[bytes]) -> None:
        for piece in self._named(pieces):
            self._plain += len(piece)
            if self._plain > self._max_bytes:
                limit = f"{self._max_bytes} bytes (max_layer_bytes)"
                raise ResourceExhaustedError(f"layer {self.blob.name} unpacks to more than {limit}")
            self._plain_hash.update(piece)
            self._write(piece)

    def _named(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        try:
            yield from pieces
        except ImageError as error:
            raise ImageError(f"layer {self.blob.name}: {error}") from error

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]


def _digest(hasher: hashlib._Hash) -> str:
    return f"{hasher.name}:{hasher.hexdigest()}"


def _judge(feed: _Feed, exit_code: int | None, out: bytes, err: bytes) -> Unpacked:
    cause = err.decode("utf-8", "replace").strip()[-500:]
    if exit_code != 0:
        kind = ResourceExhaustedError if _LIMIT.search(cause) else ImageError
        raise kind(f"layer {feed.blob.name} cannot be unpacked: {cause or f'box-agent unpack ended with {exit_code}'}")
    report = _REPORT.fullmatch(out)
    if feed.cut or report is None:
        raise ImageError(f"layer {feed.blob.name} cannot be unpacked: box-agent unpack gave no proper report")
    return Unpacked(diff_id=feed.diff_id, entries=int(report[1]), size=int(report[2]))
