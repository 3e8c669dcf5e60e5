"""An ordinary user, with subordinate ids, as whom tests run Python programs.

What such programs need (the sources, the tests, the packages of this environment that the tests use, the agent) is
copied to a folder of that user, because a checkout or an environment may lie where only root can read it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.packages import copy_packages

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
NAME = "hutch-test"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_PACKAGES = (
    *("msgspec", "anyio", "httpx2", "backports.zstd", "rich", "pytest", "pytest-timeout"),
    *("cryptography", "dnspython", "h11", "h2"),
)


class OrdinaryUser(NamedTuple):
    """The user, and the folder with copies of what the programs need."""

    place: Path
    python: str

    def command(self, *arguments: str, path: str = PATH) -> list[str]:
        """Return the command that runs Python as the user."""
        packages = os.pathsep.join(str(self.place / name) for name in ("packages", "src", "."))
        user = ["setpriv", "--reuid", NAME, "--regid", NAME, "--init-groups", "env", "-i"]
        variables = [f"HOME={self.place}", f"TMPDIR={self.place}", f"PATH={path}", f"PYTHONPATH={packages}"]
        return [*user, *variables, "PYTHONDONTWRITEBYTECODE=1", self.python, *arguments]

    def run(self, *arguments: str, path: str = PATH, seconds: float = 50) -> str:
        """Run Python as the user, to a good end, and return what it wrote."""
        done = subprocess.run(
            self.command(*arguments, path=path), cwd=self.place, timeout=seconds, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def folder(self, name: str) -> Path:
        """Return a new folder of the user."""
        path = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.place))
        shutil.chown(path, NAME, NAME)
        return path


@contextlib.contextmanager
def prepared() -> Iterator[OrdinaryUser]:
    """The user, made if need be, with all that the programs need. Raises `RuntimeError` when no Python can be used."""
    subprocess.run([ROOT / "scripts/test-user.sh"], check=True)
    place = Path(tempfile.mkdtemp(prefix="hutch-user-", dir="/tmp"))
    try:
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", place)
        copy_packages(place / "packages", _PACKAGES)
        subprocess.run(["chown", "-R", f"{NAME}:{NAME}", place], check=True)
        yield OrdinaryUser(place, _python(place))
    finally:
        shutil.rmtree(place)


def _python(place: Path) -> str:
    told = []
    for python in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        command = OrdinaryUser(place, python).command("-c", "import hutch, pytest")
        probe = subprocess.run(command, cwd="/", capture_output=True, text=True)
        if probe.returncode == 0:
            return python
        told.append(f"{python}: {probe.stderr.strip()[-400:]}")
    raise RuntimeError("no Python here that an ordinary user can run with these packages: " + "; ".join(told))
