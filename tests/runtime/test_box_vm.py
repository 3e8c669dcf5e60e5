"""What boxes that are VMs can beyond others, and what they tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import sh

if TYPE_CHECKING:
    from hutch.runtime.runtime import LocalRuntime

pytestmark = [pytest.mark.root, pytest.mark.anyio]


@pytest.fixture
def isolation() -> str:
    return "vm"


async def test_memory_that_ran_out_in_a_vm_is_told(runtime: LocalRuntime) -> None:
    """Of the command that it ran out for, and of no other."""
    box = await runtime.create(IMAGE, memory_mib=128)
    assert (await box.run(*sh("exit 1"))).oom_killed is False
    result = await box.run(*sh("tail /dev/zero"), timeout=40)
    assert result.exit_code in (137, -9) and result.oom_killed
    later = await box.run(*sh("kill -SEGV $$"))
    assert (later.exit_code, later.oom_killed) == (-11, False)
    assert (await box.stats()).oom_kills == 1
