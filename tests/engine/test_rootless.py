"""The engine's contract for an ordinary user, with subordinate ids and without."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

ROOT = Path(__file__).parent.parent.parent
USER = "hutch-test"


@pytest.fixture(scope="module")
def command() -> list[str]:
    """A Python, with this environment's packages, that the ordinary user can run (the one of this environment may be
    root's alone)."""
    subprocess.run([ROOT / "scripts/test-user.sh"], check=True)
    packages = os.pathsep.join([str(ROOT / "src"), str(ROOT), *(path for path in sys.path if "site-packages" in path)])
    home = pwd.getpwnam(USER).pw_dir
    for python in (sys.executable, shutil.which("python3", path="/usr/bin:/bin")):
        prefix = [
            *("setpriv", "--reuid", USER, "--regid", USER, "--init-groups", "env", "-i"),
            *(f"HOME={home}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", f"PYTHONPATH={packages}", str(python)),
        ]
        probe = subprocess.run([*prefix, "-c", "import anyio, msgspec, pytest"], capture_output=True, cwd="/")
        if probe.returncode == 0:
            return prefix
    pytest.skip("no Python here that an ordinary user can run with these packages")


def _contract(command: list[str], *extra: str, seconds: float = 50) -> str:
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *extra]
    done = subprocess.run(
        [*command, *arguments, "tests/engine/test_contract.py"],
        cwd=ROOT,
        timeout=seconds,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_contract_with_subordinate_ids(command: list[str]) -> None:
    output = _contract(command)
    assert "test_owners" not in output, "the suite ran without subordinate ids"


def test_contract_with_a_single_id(command: list[str], tmp_path: Path) -> None:
    """Without newuidmap a box has the id 0 alone; all else holds."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("cp", "rm", "env", "busybox"):
        program = shutil.which(name)
        assert program is not None
        (programs / name).symlink_to(program)
    tmp_path.chmod(0o755)
    for parent in (tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o055)
    without = [f"PATH={programs}" if word.startswith("PATH=") else word for word in command]
    output = _contract(without, "-rs")
    assert "boxes have one id here" in output


SCRIPT = """
import anyio, pathlib, sys
from tests import rootfs
from tests.engine.boxes import plan, running
from hutch.engine.container import ContainerEngine
from hutch.types import Limits

async def main():
    here = pathlib.Path(sys.argv[1])
    engine = ContainerEngine()
    image = rootfs.build(here / "image")
    box_plan = plan(here / "box", image, limits=Limits(memory_mib=64, cpus=1, pids=24))
    async with running(engine, box_plan) as box:
        print(box.started.unenforced)
        output = await box.sh("for i in $(seq 60); do sleep 30 & done; echo started")
        print("fork" in output.err)
        other = plan(here / "other", image, limits=Limits(pids=24))
        async with running(engine, other) as second:
            print((await second.sh("echo second")).out.strip())
    await engine.remove_tree(here / "box")
    print((here / "box").exists())

anyio.run(main)
"""


def test_limits_of_an_ordinary_user(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """No control groups: the number of processes is limited all the same, box by box; the rest is named."""
    folder = subprocess.run(["mktemp", "-d", "/tmp/hutch-rootless.XXXXXX"], capture_output=True, text=True, check=True)
    place = Path(folder.stdout.strip())
    shutil.chown(place, USER)
    try:
        done = subprocess.run(
            [*command, "-c", SCRIPT, str(place)], capture_output=True, text=True, cwd=ROOT, timeout=30
        )
        assert done.stdout.splitlines() == ["('cpus', 'memory')", "True", "second", "False"], done.stderr
    finally:
        shutil.rmtree(place)
