"""What the remote runtime has beyond the embedded one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

import hutch.sync
from hutch.errors import InvalidArgumentError, UnauthenticatedError
from hutch.sdk.remote import RemoteRuntime
from tests.remote.conftest import TOKEN
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import Sink, in_time, sh

if TYPE_CHECKING:
    from hutch.sdk.remote_box import RemoteBox
    from tests.remote.processes import Process

pytestmark = [pytest.mark.root, pytest.mark.anyio]

# Grows until the kernel ends it.
GREEDY = sh("x=0123456789; while :; do x=$x$x; done")


async def test_who_am_i(runtime: RemoteRuntime, server: Process) -> None:
    identity = await runtime.whoami()
    assert (identity.sub, identity.scopes, identity.path_prefix) == ("key:all", ("read", "write"), None)
    async with RemoteRuntime(server.url, "wrong") as stranger:
        with pytest.raises(UnauthenticatedError):
            await stranger.whoami()


@pytest.mark.parametrize("prefix", ["a b", "a?b", "..%2f", "a//b"])
async def test_what_is_no_prefix(prefix: str) -> None:
    with pytest.raises(InvalidArgumentError, match="prefix"):
        RemoteRuntime("http://localhost", path_prefix=prefix)


async def test_memory_that_ran_out_is_told(runtime: RemoteRuntime) -> None:
    box = await runtime.create(IMAGE, memory_mib=128)
    with in_time(40):
        result = await box.run(*GREEDY)
        assert (result.exit_code, result.oom_killed) == (-9, True)
        result = await box.run("true")
        assert (result.exit_code, result.oom_killed) == (0, False)
        execution = await box.exec(*sh('read x; exec "$@"'), "sh", *GREEDY, stdin=True)
        late = await box.attach(execution.id)
        await execution.stdin.write(b"go\n")
        assert (await late.wait()).oom_killed and (await execution.wait()).oom_killed


async def test_without_a_limit_memory_does_not_run_out(box: RemoteBox) -> None:
    result = await box.run(*sh("kill -9 $$"))
    assert (result.exit_code, result.oom_killed) == (-9, False)


def test_without_async(server: Process) -> None:
    with hutch.sync.connect(server.url, TOKEN) as runtime, runtime.create(IMAGE, auto_remove=True) as box:
        assert box.run("echo", "hello").text == "hello\n"


async def test_a_main_command_that_ends_at_once_is_watched_whole(runtime: RemoteRuntime) -> None:
    for number in range(20):
        job = await runtime.create(IMAGE, command=sh(f"echo {number}; echo err >&2; exit 3"))
        out, err = Sink(), Sink()
        with in_time():
            result = await (await job.start_attached(stdout=out, stderr=err)).wait()
        assert (bytes(out.data), bytes(err.data), result.exit_code) == (b"%d\n" % number, b"err\n", 3)
        assert await job.wait() == 3
        await job.remove()


async def test_a_runtime_whose_opening_is_cancelled_is_closed(server: Process) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with RemoteRuntime(server.url, TOKEN):
            raise AssertionError("it was opened")
    assert scope.cancelled_caught
