"""A Debian with the programs that people use, made once for all runs, and a host of secrets for package managers."""

from __future__ import annotations

import base64
import ensurepip
import hashlib
import io
import shutil
import zipfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hutch.image import ImageStore
from hutch.types import Mount
from tests import debian
from tests.packages import copy_packages

if TYPE_CHECKING:
    import socket

STORE = debian.CACHE.parent / "programs-store"
IMAGE = "programs:test"
SITE = "/opt/site"
"""Where Python finds the packages of `site`."""

_DEBIAN = ["ca-certificates", "curl", "git", "nodejs", "python3"]
_PYTHON = ("requests", "httpx2", "httpcore2", "h2")
WHEEL = "tiny-1.0-py3-none-any.whl"


async def store() -> Path:
    """The image store."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("needs mmdebstrap")
    images = ImageStore(STORE)
    if not any(IMAGE in info.references for info in images.list()):
        await images.bootstrap(reference=IMAGE, packages=_DEBIAN)
    return STORE


def site(folder: Path) -> Mount:
    """Fill a folder with the packages, and pip; returns how a box gets it."""
    copy_packages(folder, _PYTHON)
    (wheel,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    shutil.copy(wheel, folder / "pip.whl")
    return Mount(source=str(folder), target=SITE, read_only=True)


def _wheel() -> bytes:
    data = io.BytesIO()
    info = "tiny-1.0.dist-info"
    files = {
        "tiny.py": "SIZE = 1\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return data.getvalue()


class Shelf:
    """An index of Python packages and a git repository, for who knows the password."""

    def __init__(self, password: str) -> None:
        self._allowed = "Basic " + base64.b64encode(f"user:{password}".encode()).decode()
        self.served: list[str] = []
        wheel = _wheel()
        link = f'<a href="/files/{WHEEL}#sha256={hashlib.sha256(wheel).hexdigest()}">{WHEEL}</a>'
        self._files = {
            "/simple/tiny/": ("text/html", f"<!DOCTYPE html><html><body>{link}</body></html>".encode()),
            f"/files/{WHEEL}": ("application/octet-stream", wheel),
            "/tiny.git/info/refs": ("text/plain", b"0123456789abcdef0123456789abcdef01234567\trefs/heads/main\n"),
            "/tiny.git/HEAD": ("text/plain", b"ref: refs/heads/main\n"),
        }

    def handle(self, connection: socket.socket) -> None:
        """Serve one connection."""
        shelf = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.headers.get("Authorization") == shelf._allowed
                path = self.path.partition("?")[0]
                kind, data = shelf._files.get(path, ("text/plain", b"")) if known else ("text/plain", b"")
                self.send_response((200 if data else 404) if known else 401)
                if not known:
                    self.send_header("WWW-Authenticate", 'Basic realm="shelf"')
                elif data:
                    shelf.served.append(path)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        Handler(connection, ("", 0), None)  # type: ignore[arg-type]
