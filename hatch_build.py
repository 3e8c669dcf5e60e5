"""Build hook: compiles the agent, static, into the wheel."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class AgentBuildHook(BuildHookInterface[Any]):
    """Runs ``make -C agent`` and marks the wheel as one for x86-64 Linux (a static program needs no libc)."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        if shutil.which("musl-gcc") is None:
            raise RuntimeError("musl-gcc is needed to compile the agent: apt-get install musl-tools")
        subprocess.run(["make", "-s", "-C", str(root / "agent")], check=True)
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"
