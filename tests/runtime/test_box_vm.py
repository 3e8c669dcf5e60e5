"""What boxes that are VMs can beyond others, and what they tell."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from hutch.types import BoxState
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import Sink, next_line, sh, until

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


async def test_a_fork_goes_on_where_its_parent_is(runtime: LocalRuntime) -> None:
    """With all that runs, and as a box of its own: other entropy, other names, its own disk, the right time."""
    parent = await runtime.create(IMAGE)
    await parent.run(*sh("echo common > /disk; echo common > /dev/shm/memory"))
    ticks = Sink()
    ticking = await parent.exec(
        *sh("i=0; while read x < /go$i || sleep 0.02; do i=$((i+1)); echo $i; done"), stdout=ticks
    )
    counting = await parent.exec(*sh("echo begun; read word; echo got $word; exit 7"), stdin=True)
    assert await next_line(aiter(counting.stdout)) == b"begun\n"
    await until(lambda: len(ticks.data) > 4)
    child = await parent.fork("child")
    assert (child.name, (await child.info()).state) == ("child", BoxState.RUNNING)
    for box, word in ((parent, "parent"), (child, "child")):
        assert (await box.run("cat", "/disk", "/dev/shm/memory")).text == "common\ncommon\n"
        await box.run(*sh(f"echo {word} > /disk"))
        assert abs(int((await box.run("date", "+%s")).text) - time.time()) < 2
        assert (await box.run("hostname")).text == f"{box.name or box.id}\n"
    facts = {}
    for box in (parent, child):
        facts[box.id] = [
            (await box.run(*sh("head -c 16 /dev/urandom | od -An -tx1"))).text,
            (await box.run("cat", "/etc/machine-id")).text,
        ]
    assert not set(facts[parent.id]) & set(facts[child.id])
    # The command goes on in both, under one id.
    known = {execution.id for execution in await child.executions()}
    assert {ticking.id, counting.id} <= known
    twin = await child.attach(counting.id)
    await twin.stdin.write(b"child\n")
    await counting.stdin.write(b"parent\n")
    assert (await twin.wait()).stdout == b"begun\ngot child\n"
    assert (await counting.wait()).exit_code == 7
    before = len(ticks.data)
    await until(lambda: len(ticks.data) > before)
    await parent.remove(force=True)
    assert (await child.run("cat", "/disk")).text == "child\n"
    grandchild = await child.fork()
    await child.stop()
    assert (await grandchild.run("cat", "/disk")).text == "child\n"
    await child.start()
    assert (await child.run("cat", "/disk")).text == "child\n"
