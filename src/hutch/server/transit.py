"""Archives on their way between clients and boxes."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PREFIX = "transit-"


class Transit:
    """A folder with a place for each archive."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        """A path for one file, which is gone after the block."""
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=_PREFIX) as folder:
            yield Path(folder) / "archive"

    def clear(self) -> None:
        """Remove what a server left that was killed."""
        for left in self._folder.glob(f"{_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
