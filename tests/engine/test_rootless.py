"""The engine's contract for an ordinary user, with subordinate ids and without."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.ordinary_user import NAME, PATH

if TYPE_CHECKING:
    from pathlib import Path

    from tests.ordinary_user import OrdinaryUser

pytestmark = pytest.mark.root

SUITES = ("tests/engine/test_contract.py", "tests/engine/test_vm.py", "tests/engine/test_vm_mounts.py")


def _contract(user: OrdinaryUser, chosen: str, *extra: str, path: str = PATH, seconds: float = 50) -> str:
    temporary = f"--basetemp={user.folder('contract')}"
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", temporary, "-k", chosen, *extra]
    return user.run(*arguments, *SUITES, path=path, seconds=seconds)


def test_contract_with_subordinate_ids(ordinary_user: OrdinaryUser) -> None:
    output = _contract(ordinary_user, "not vm")
    assert "test_owners" not in output, "the suite ran without subordinate ids"


def test_contract_with_a_single_id(ordinary_user: OrdinaryUser) -> None:
    """Without newuidmap a box has the id 0 alone; all else holds."""
    programs = ordinary_user.folder("bin")
    for name in ("busybox", "cp", "du", "env", "mv", "rm", "setpriv"):
        program = shutil.which(name)
        assert program is not None
        (programs / name).symlink_to(program)
    output = _contract(ordinary_user, "not vm", "-rs", path=str(programs))
    assert "boxes have one id here" in output


@pytest.mark.timeout(120)
def test_contract_of_vms(ordinary_user: OrdinaryUser, vm_store: Path) -> None:
    """The main steps, and the emulator's confinement: here by a user namespace."""
    store = ordinary_user.place / ".cache"
    shutil.copytree(vm_store / "kernels", store / "vm/kernels", ignore=shutil.ignore_patterns("lock"))
    subprocess.run(["chown", "-R", NAME, store], check=True)
    steps = "answers or survive or frozen_upper or writable or deep_folder or test_mounts or both_sides"
    chosen = f"vm and ({steps} or confined or that_others)"
    _contract(ordinary_user, chosen, seconds=100)


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
    box_plan = plan(here / "box", image, limits=Limits(memory_mib=64, cpus=1, pids=24, disk_gb=1))
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


def test_limits_of_an_ordinary_user(ordinary_user: OrdinaryUser) -> None:
    """No control groups: the number of processes is limited all the same, box by box; the rest is named."""
    output = ordinary_user.run("-c", SCRIPT, str(ordinary_user.folder("limits")))
    assert output.splitlines() == ["('cpus', 'memory', 'disk')", "True", "second", "False"]
