"""A real Debian for tests, made once for all runs from the machine's own mirror."""

from __future__ import annotations

import shutil
from pathlib import Path

import anyio
import pytest

from hutch.image import ImageStore

CACHE = Path("~/.cache/hutch-tests/debian").expanduser()


async def layout() -> Path:
    """Return an OCI layout that holds a minimal Debian under the name ``debian``, with a second layer that takes
    /etc/issue away."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("needs mmdebstrap")
    layout = CACHE / "oci"
    if not (layout / "done").exists():
        shutil.rmtree(CACHE, ignore_errors=True)
        store = ImageStore(CACHE / "store")
        info = await store.bootstrap(reference="debian:test")
        (rootfs,) = store.layer_paths(info)
        for words in (
            ("init", "--layout", "oci"),
            ("new", "--image", "oci:debian"),
            ("insert", "--image", "oci:debian", str(rootfs), "/"),
            ("insert", "--image", "oci:debian", "--whiteout", "/etc/issue"),
        ):
            await anyio.run_process(["umoci", *words], cwd=CACHE)
        (layout / "done").touch()
    return layout
