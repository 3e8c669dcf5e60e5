"""Docker's HTTP API, spoken to the daemon's socket without a client program: what a program without the tool does."""

from __future__ import annotations

import http.client
import json
import socket
from typing import TYPE_CHECKING, Any

from bench.peers.base import PeerError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_SECONDS = 120.0
_BUFFER = 1 << 20


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_SECONDS)
        self.sock.connect(str(self._path))


class DockerApi:
    """One connection that is kept, and one more for each output, as the API wants it."""

    def __init__(self, path: Path, container: str, image: str) -> None:
        """``path``: the daemon's socket; ``container``: one that runs."""
        self._path = path
        self._container = container
        self._image = image
        self._kept = _Connection(path)

    def close(self) -> None:
        """Close the connection."""
        self._kept.close()

    def execute(self, command: Sequence[str]) -> int:
        """Run a command: create, start with its output, ask for its exit code. Returns the size of the output with
        its frame headers. Raises `PeerError` when it fails."""
        body = {"Cmd": list(command), "AttachStdout": True, "AttachStderr": True}
        made = self._call("POST", f"/containers/{self._container}/exec", body)["Id"]
        size = self._output(f"/exec/{made}/start", {"Detach": False, "Tty": False})
        if code := self._call("GET", f"/exec/{made}/json")["ExitCode"]:
            raise PeerError(f"the command ended with {code}")
        return size

    def one_shot(self) -> str:
        """Make a container, run ``true`` in it and wait for its end; returns its id, for `remove`."""
        body = {"Image": self._image, "Cmd": ["true"], "HostConfig": {"NetworkMode": "none"}}
        made: str = self._call("POST", "/containers/create", body)["Id"]
        self._call("POST", f"/containers/{made}/start")
        if code := self._call("POST", f"/containers/{made}/wait")["StatusCode"]:
            raise PeerError(f"the container ended with {code}")
        return made

    def remove(self, container: str) -> None:
        """Remove a container."""
        self._call("DELETE", f"/containers/{container}?force=1")

    def _call(self, method: str, path: str, body: object = None) -> Any:
        _send(self._kept, method, path, body)
        answer = self._kept.getresponse()
        data = answer.read()
        if answer.status >= 300:
            raise PeerError(f"{method} {path}: {answer.status} {data[:200].decode(errors='replace')}")
        return json.loads(data) if data else None

    def _output(self, path: str, body: object) -> int:
        connection = _Connection(self._path)
        try:
            _send(connection, "POST", path, body)
            answer = connection.getresponse()
            if answer.status >= 300:
                raise PeerError(f"POST {path}: {answer.status} {answer.read(200).decode(errors='replace')}")
            buffer = memoryview(bytearray(_BUFFER))
            total = 0
            while count := answer.readinto(buffer):
                total += count
            return total
        finally:
            connection.close()


def _send(connection: _Connection, method: str, path: str, body: object) -> None:
    data = b"" if body is None else json.dumps(body).encode()
    connection.request(method, path, data or None, {"Content-Type": "application/json"})
