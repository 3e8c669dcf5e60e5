"""Registries for tests: Debian's docker-registry, one that misbehaves, and what is needed to fill them.

Nothing here uses the code under test.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import os
import socket
import subprocess
import tarfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
START_TIMEOUT = 20.0


def digest(data: bytes) -> str:
    """The digest of a blob."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def entry(name: str, content: bytes | None = None, **attributes: Any) -> tuple[tarfile.TarInfo, bytes]:
    """One member: a file with content, else (by default) a folder; attributes of TarInfo come by name."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
    info.mode = 0o755 if content is None else 0o644
    info.size = len(content or b"")
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content or b""


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A tar of members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


@dataclass
class Image:
    """An image made of tars. ``compress`` gives the stored form of a layer, ``suffix`` the end of its media type."""

    layers: Sequence[bytes]
    config: dict[str, Any] = field(default_factory=dict)
    architecture: str = "amd64"
    variant: str = ""
    compress: Callable[[bytes], bytes] = lambda data: gzip.compress(data, 1, mtime=0)
    suffix: str = "+gzip"

    def __post_init__(self) -> None:
        self.blobs = [self.compress(layer) for layer in self.layers]
        self.diff_ids = [digest(layer) for layer in self.layers]
        document = {
            "architecture": self.architecture,
            "os": "linux",
            "config": self.config,
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
            **({"variant": self.variant} if self.variant else {}),
        }
        self.config_blob = json.dumps(document).encode()
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": self.descriptor(self.config_blob, OCI_CONFIG),
                "layers": [self.descriptor(blob, OCI_LAYER + self.suffix) for blob in self.blobs],
            }
        ).encode()

    @staticmethod
    def descriptor(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        """A descriptor of a blob."""
        return {"mediaType": media_type, "digest": digest(data), "size": len(data), **more}


def index_of(images: Sequence[Image]) -> bytes:
    """An index of images for several platforms."""
    entries = [
        Image.descriptor(
            image.manifest,
            OCI_MANIFEST,
            platform={
                "os": "linux",
                "architecture": image.architecture,
                **({"variant": image.variant} if image.variant else {}),
            },
        )
        for image in images
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class DockerRegistry:
    """A running docker-registry on loopback."""

    def __init__(self, port: int) -> None:
        self.host = f"127.0.0.1:{port}"

    def push(self, repository: str, tag: str, images: Image | Sequence[Image]) -> str:
        """Store an image, or an index of several; return the digest that the tag names."""
        several = [images] if isinstance(images, Image) else list(images)
        for image in several:
            for blob in (*image.blobs, image.config_blob):
                self._push_blob(repository, blob)
            self._push_manifest(repository, digest(image.manifest), image.manifest, OCI_MANIFEST)
        document = several[0].manifest if isinstance(images, Image) else index_of(several)
        kind = OCI_MANIFEST if isinstance(images, Image) else OCI_INDEX
        self._push_manifest(repository, tag, document, kind)
        return digest(document)

    def _push_blob(self, repository: str, blob: bytes) -> None:
        location = self._request("POST", f"/v2/{repository}/blobs/uploads/", 202)
        path = location.split(self.host, 1)[-1]
        joint = "&" if "?" in path else "?"
        self._request("PUT", f"{path}{joint}digest={digest(blob)}", 201, blob, "application/octet-stream")

    def _push_manifest(self, repository: str, target: str, data: bytes, media_type: str) -> None:
        self._request("PUT", f"/v2/{repository}/manifests/{target}", 201, data, media_type)

    def _request(
        self, method: str, path: str, expected: int, body: bytes = b"", content_type: str = "text/plain"
    ) -> str:
        connection = http.client.HTTPConnection(self.host, timeout=20)
        try:
            connection.request(method, path, body, {"Content-Type": content_type})
            response = connection.getresponse()
            said = response.read()
            assert response.status == expected, (method, path, response.status, said[:300])
            return response.headers.get("Location", "")
        finally:
            connection.close()


@contextmanager
def docker_registry(folder: Path, *, users: str = "") -> Iterator[DockerRegistry]:
    """Run a registry. ``users`` is the content of an htpasswd file (bcrypt); none: everyone may push and pull."""
    port = free_port()
    config: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    if users:
        (folder / "htpasswd").write_text(users)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    (folder / "registry.json").write_text(json.dumps(config))  # JSON is YAML
    environment = {key: value for key, value in os.environ.items() if not key.startswith("REGISTRY_")}
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(folder / "registry.json")], stdout=log, stderr=log, env=environment
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "registry.log").read_text()
                assert time.monotonic() < deadline, "docker-registry does not start"
                time.sleep(0.02)
        yield DockerRegistry(port)
    finally:
        process.kill()
        process.wait(timeout=10)


class Exchange(BaseHTTPRequestHandler):
    """One request to the misbehaving registry, with the means to misbehave."""

    protocol_version = "HTTP/1.1"
    timeout = 20

    def do_GET(self) -> None:
        """Pass the request on."""
        server = self.server
        assert isinstance(server, HostileRegistry)
        with server.guard:
            server.requests.append((self.path, dict(self.headers)))
        try:
            server.serve(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole answer; ``_`` in header names stands for ``-``."""
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def cut(self) -> None:
        """Break the connection."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class HostileRegistry(ThreadingHTTPServer):
    """Serves images truthfully, except where ``rules`` (path part -> handler) say otherwise."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.guard = threading.Lock()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.rules: dict[str, Callable[[Exchange], None]] = {}
        self.content: dict[str, tuple[bytes, str]] = {}

    def add(self, repository: str, tag: str, image: Image) -> None:
        """Store an image."""
        base = f"/v2/{repository}"
        for target in (tag, digest(image.manifest)):
            self.content[f"{base}/manifests/{target}"] = (image.manifest, OCI_MANIFEST)
        for blob in (*image.blobs, image.config_blob):
            self.content[f"{base}/blobs/{digest(blob)}"] = (blob, "application/octet-stream")

    def serve(self, exchange: Exchange) -> None:
        """Answer one request."""
        for part, handler in self.rules.items():
            if part in exchange.path:
                return handler(exchange)
        return self.honest(exchange)

    def honest(self, exchange: Exchange) -> None:
        """Answer as a registry should."""
        found = self.content.get(exchange.path)
        if exchange.path == "/v2/":
            exchange.reply(200, b"{}")
        elif found is None:
            error = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}
            exchange.reply(404, json.dumps(error).encode())
        elif wanted := exchange.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            span = f"bytes {start}-{len(found[0]) - 1}/{len(found[0])}"
            exchange.reply(206, found[0][start:], Content_Type=found[1], Content_Range=span)
        else:
            exchange.reply(200, found[0], Content_Type=found[1])

    def asked(self, part: str) -> list[dict[str, str]]:
        """The headers of the requests whose path has this part."""
        with self.guard:
            return [headers for path, headers in self.requests if part in path]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gives up is expected."""


@contextmanager
def hostile_registry() -> Iterator[HostileRegistry]:
    """Run a misbehaving registry."""
    server = HostileRegistry()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
