"""Podman, without a daemon, with its storage in a temporary folder and runc below it."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

from bench import mounts
from bench.peers.base import CGROUP, PeerError, call, end_strays, remove_cgroups, supervised_pss, timed

if TYPE_CHECKING:
    from pathlib import Path

# The default limits are above what root may set where it lacks CAP_SYS_RESOURCE.
_RUN = (
    "run",
    "--network=none",
    f"--cgroup-parent=/{CGROUP}-podman",
    "--ulimit=nofile=1024:1024",
    "--ulimit=nproc=1024:1024",
)


class Podman:
    """See the module. Implements `Peer`, `Puller` and `Copier` of `bench.peers.base`."""

    name = "podman"

    def __init__(self, folder: Path, image: str) -> None:
        self._folder = folder
        self._image = image
        self._started = False

    def start(self) -> None:
        """See `Peer.start`."""
        if shutil.which("podman") is None:
            raise PeerError("podman is not installed")
        self._folder.mkdir(parents=True)
        self._started = True
        call([*self._tool(), "pull", "-q", "--tls-verify=false", self._image])
        call([*self._tool(), *_RUN, "-d", "--name=main", self._image, "sleep", "100000"])

    def stop(self) -> None:
        """See `Peer.stop`."""
        if self._started:
            self._started = False
            with contextlib.suppress(PeerError):  # what is left is taken away below
                call([*self._tool(), "rm", "-fa", "-t", "0"])
            end_strays(self._folder)
            mounts.unmount(self._folder / "root" / "overlay")
        remove_cgroups(f"{CGROUP}-podman")
        shutil.rmtree(self._folder, ignore_errors=True)

    def exec_argv(self, *command: str) -> list[str]:
        """See `Peer.exec_argv`."""
        return [*self._tool(), "exec", "main", *command]

    def one_shot(self) -> float:
        """See `Peer.one_shot`. In the time: the removal."""
        return timed(lambda: call([*self._tool(), *_RUN, "--rm", self._image, "true"]))

    def idle(self) -> int:
        """See `Peer.idle`. The supervisor is conmon."""
        name = call([*self._tool(), *_RUN, "-d", self._image, "sleep", "100000"]).strip()
        try:
            pid = int(call([*self._tool(), "inspect", "-f", "{{.State.Pid}}", name]))
            return supervised_pss(pid, ["conmon"])
        finally:
            call([*self._tool(), "rm", "-f", "-t", "0", name])

    def pull(self, reference: str) -> float:
        """See `Puller.pull`."""
        return timed(lambda: call([*self._tool(), "pull", "-q", "--tls-verify=false", reference]))

    def put(self, path: Path) -> float:
        """See `Copier.put`."""
        return timed(lambda: call([*self._tool(), "cp", str(path), "main:/copy"]))

    def get(self, path: Path) -> float:
        """See `Copier.get`."""
        return timed(lambda: call([*self._tool(), "cp", "main:/copy", str(path)]))

    def _tool(self) -> list[str]:
        return [
            "podman",
            f"--root={self._folder / 'root'}",
            f"--runroot={self._folder / 'run'}",
            f"--tmpdir={self._folder / 'tmp'}",
            "--storage-driver=overlay",
            "--cgroup-manager=cgroupfs",
            "--events-backend=none",
            "--runtime=runc",
        ]
