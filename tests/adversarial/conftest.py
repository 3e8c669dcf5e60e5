"""The fixtures of the embedded runtime's tests."""

from __future__ import annotations

from tests.runtime.conftest import box, home, images, isolation, runtime

__all__ = ["box", "home", "images", "isolation", "runtime"]
