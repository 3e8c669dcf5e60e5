"""What the server needs of a runtime beyond `hutch.sdk.base`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator

    from hutch.sdk.base import Box, Files


class TarFiles(Protocol):
    """Files as tar streams, uncompressed."""

    async def put_tar(self, archive: AsyncIterable[bytes], target: str, *, is_directory: bool) -> None:
        """Unpack a stream: below the directory ``target``, which is made; or, if not ``is_directory``, its only entry
        as ``target`` (into it, if that is a directory or ends in ``/``)."""

    def get_tar(self, source: str) -> AsyncIterator[bytes]:
        """A file or directory as a stream; an error may come after the first bytes."""


def tar_files(box: Box) -> TarFiles:
    """The files of a box; all runtimes use `hutch.runtime.files`, which has both."""
    files: Files = box.files
    return cast("TarFiles", files)
