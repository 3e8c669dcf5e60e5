"""Docker: a daemon of our own, with its data in a temporary folder, driven by the client of the same version."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

from bench.peers.base import (
    CGROUP,
    PeerError,
    call,
    end_process,
    end_strays,
    remove_cgroups,
    supervised_pss,
    timed,
    until,
)
from bench.peers.docker_api import DockerApi

_READY_SECONDS = 60.0


class Docker:
    """See the module. Implements `Peer`, `Puller` and `Copier` of `bench.peers.base`."""

    name = "docker"

    def __init__(self, folder: Path, image: str) -> None:
        self._folder = folder
        self._image = image
        self._daemon: subprocess.Popen[bytes] | None = None
        # Beside the daemon stands the client that belongs to it; an older or newer one may come first on the PATH.
        client = Path("/usr/bin/docker")
        self._client = str(client) if client.exists() else "docker"

    def start(self) -> None:
        """See `Peer.start`."""
        program = shutil.which("dockerd") or shutil.which("dockerd", path="/usr/sbin:/usr/local/sbin")
        if program is None:
            raise PeerError("dockerd is not installed")
        self._folder.mkdir(parents=True)
        with (self._folder / "log").open("wb") as log:
            self._daemon = subprocess.Popen(
                [
                    program,
                    f"--data-root={self._folder / 'data'}",
                    f"--exec-root={self._folder / 'exec'}",
                    f"--pidfile={self._folder / 'pid'}",
                    f"--host=unix://{self._folder / 'sock'}",
                    f"--cgroup-parent=/{CGROUP}-docker",
                    "--exec-opt=native.cgroupdriver=cgroupfs",
                    "--storage-driver=overlay2",
                    "--iptables=false",
                    "--ip6tables=false",
                    "--bridge=none",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(self._is_ready, _READY_SECONDS, "dockerd does not answer")
        call([*self._tool(), "pull", "-q", self._image])
        call([*self._tool(), "run", "-d", "--network=none", "--name=main", self._image, "sleep", "100000"])

    def stop(self) -> None:
        """See `Peer.stop`."""
        if self._daemon is not None:
            with contextlib.suppress(PeerError):  # there is none, or no daemon any more
                call([*self._tool(), "rm", "-f", *call([*self._tool(), "ps", "-aq"]).split()])
            end_process(self._daemon)
            self._daemon = None
        end_strays(self._folder)
        remove_cgroups(f"{CGROUP}-docker")
        shutil.rmtree(self._folder, ignore_errors=True)

    def api(self) -> DockerApi:
        """The daemon's API, and the container that runs, for who does without the client."""
        return DockerApi(self._folder / "sock", "main", self._image)

    def exec_argv(self, *command: str) -> list[str]:
        """See `Peer.exec_argv`."""
        return [*self._tool(), "exec", "main", *command]

    def one_shot(self) -> float:
        """See `Peer.one_shot`. In the time: the removal, which the client waits for."""
        return timed(lambda: call([*self._tool(), "run", "--rm", "--network=none", self._image, "true"]))

    def idle(self) -> int:
        """See `Peer.idle`. The supervisor is containerd's shim."""
        name = call([*self._tool(), "run", "-d", "--network=none", self._image, "sleep", "100000"]).strip()
        try:
            pid = int(call([*self._tool(), "inspect", "-f", "{{.State.Pid}}", name]))
            return supervised_pss(pid, ["containerd-shim"])
        finally:
            call([*self._tool(), "rm", "-f", name])

    def pull(self, reference: str) -> float:
        """See `Puller.pull`."""
        return timed(lambda: call([*self._tool(), "pull", "-q", reference]))

    def put(self, path: Path) -> float:
        """See `Copier.put`."""
        return timed(lambda: call([*self._tool(), "cp", str(path), "main:/copy"]))

    def get(self, path: Path) -> float:
        """See `Copier.get`."""
        return timed(lambda: call([*self._tool(), "cp", "main:/copy", str(path)]))

    def _tool(self) -> list[str]:
        return [self._client, "--config", str(self._folder / "config"), "-H", f"unix://{self._folder / 'sock'}"]

    def _is_ready(self) -> bool:
        if self._daemon is not None and self._daemon.poll() is not None:
            raise PeerError(f"dockerd ended: {(self._folder / 'log').read_text(errors='replace').strip()[-300:]}")
        try:
            call([*self._tool(), "version"])
        except PeerError:
            return False
        return True
