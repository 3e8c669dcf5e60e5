"""skopeo and umoci: the pair that fetches an image and unpacks it without an engine."""

from __future__ import annotations

import itertools
import shutil
import time
from typing import TYPE_CHECKING

from bench.peers.base import PeerError, call

if TYPE_CHECKING:
    from pathlib import Path


class SkopeoUmoci:
    """See the module. Implements `bench.peers.base.Puller`."""

    name = "skopeo + umoci"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()

    def pull(self, reference: str) -> float:
        """See `Puller.pull`."""
        for tool in ("skopeo", "umoci"):
            if shutil.which(tool) is None:
                raise PeerError(f"{tool} is not installed")
        folder = self._folder / str(next(self._numbers))
        folder.mkdir(parents=True)
        layout, bundle = f"{folder / 'layout'}:1", str(folder / "bundle")
        began = time.perf_counter()
        call(["skopeo", "copy", "-q", "--src-tls-verify=false", f"docker://{reference}", f"oci:{layout}"])
        call(["umoci", "unpack", "--image", layout, bundle])
        return time.perf_counter() - began
