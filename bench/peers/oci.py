"""The OCI runtimes crun and runc, driven as an engine would: a bundle on an overlay of the unpacked image."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
from typing import TYPE_CHECKING, Any

from bench import mounts
from bench.peers.base import CGROUP, PeerError, call, pss, remove_cgroups

if TYPE_CHECKING:
    from pathlib import Path


class OciRuntime:
    """See the module. Implements `bench.peers.base.Peer`. ``rootfs``: the unpacked image."""

    def __init__(self, name: str, folder: Path, rootfs: Path) -> None:
        self.name = name
        self._folder = folder
        self._rootfs = rootfs
        self._numbers = itertools.count()
        self._state = folder / "state"
        self._main = ""
        self._bundles: list[str] = []

    def start(self) -> None:
        """See `Peer.start`."""
        if shutil.which(self.name) is None:
            raise PeerError(f"{self.name} is not installed")
        self._folder.mkdir(parents=True)
        call([self.name, "spec"], cwd=self._folder)
        self._spec: dict[str, Any] = json.loads((self._folder / "config.json").read_text())
        self._main = self._bundle(["sleep", "100000"])
        self._run_detached(self._main)

    def stop(self) -> None:
        """See `Peer.stop`."""
        for name in list(self._bundles):
            self._remove(name)
        remove_cgroups(f"{CGROUP}-{self.name}")
        shutil.rmtree(self._folder, ignore_errors=True)

    def exec_argv(self, *command: str) -> list[str]:
        """See `Peer.exec_argv`."""
        return [*self._tool(), "exec", self._main, *command]

    def one_shot(self) -> float:
        """See `Peer.one_shot`. In the time: the overlay, the bundle, the run. Not in it: the removal."""
        began = time.perf_counter()
        name = self._bundle(["true"])
        call([*self._tool(), "run", "--bundle", str(self._folder / name), name])
        elapsed = time.perf_counter() - began
        self._remove(name)
        return elapsed

    def idle(self) -> int:
        """See `Peer.idle`. These runtimes leave no supervisor."""
        name = self._bundle(["sleep", "100000"])
        try:
            self._run_detached(name)
            state = json.loads(call([*self._tool(), "state", name]))
            return pss(int(state["pid"]))
        finally:
            self._remove(name)

    def _tool(self) -> list[str]:
        return [self.name, "--root", str(self._state)]

    def _run_detached(self, name: str) -> None:
        # The container keeps the outputs of its starter, so they must not be pipes that anyone reads to the end.
        bundle = self._folder / name
        command = [*self._tool(), "run", "-d", "--bundle", ".", name]
        call(["sh", "-c", 'exec "$@" >/dev/null 2>err', "sh", *command], cwd=bundle)

    def _bundle(self, command: list[str]) -> str:
        name = f"{CGROUP}-{self.name}-{next(self._numbers)}"
        folder = self._folder / name
        for part in ("upper", "work", "rootfs"):
            (folder / part).mkdir(parents=True)
        mounts.overlay(self._rootfs, folder / "upper", folder / "work", folder / "rootfs")
        self._bundles.append(name)
        self._spec["process"].update(args=command, terminal=False)
        self._spec["root"] = {"path": "rootfs", "readonly": False}
        self._spec["linux"]["cgroupsPath"] = f"/{CGROUP}-{self.name}/{name}"
        (folder / "config.json").write_text(json.dumps(self._spec))
        return name

    def _remove(self, name: str) -> None:
        with contextlib.suppress(PeerError):  # a run that has ended has deleted itself
            call([*self._tool(), "delete", "--force", name])
        mounts.unmount(self._folder / name / "rootfs")
        shutil.rmtree(self._folder / name, ignore_errors=True)
        self._bundles.remove(name)
