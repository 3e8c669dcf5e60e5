"""A box that is a VM, at the far end of API and runner."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import httpx2
import pytest

from hutch.errors import InvalidStateError
from hutch.sdk.remote import RemoteRuntime
from hutch.types import BoxState
from tests.e2e.fleet import KEY, Chain, shared_home
from tests.remote.faultproxy import Fault
from tests.remote.test_faults import numbers
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import Sink, in_time, sh, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hutch.sdk.remote_box import RemoteBox

pytestmark = [pytest.mark.root, pytest.mark.anyio]

LAST = 30_000
NOISE = os.urandom(1_000_000)


@pytest.fixture
async def chain(tmp_path: Path, images: Path, vm_store: Path) -> AsyncIterator[Chain]:
    """A fleet of its own with a fault proxy in both hops, whose runner has what VMs are made from."""
    home = shared_home(tmp_path, images)
    (home / "vm").symlink_to(vm_store)
    async with Chain(tmp_path, home) as chain:
        yield chain


async def cut_once(chain: Chain, far: RemoteBox) -> None:
    """Commands whose connections break in either hop, at bytes within the handshake, the first frames, the output."""
    for proxy in (chain.front, chain.back):
        for kind, after in (("cut", 150), ("reset", 100_000)):
            faults = [Fault(kind=kind, after=after)] * 2
            proxy.choose = lambda faults=faults: faults.pop() if faults else Fault()  # type: ignore[misc]
            proxy.cut_all()
            with in_time(30):
                result = await far.run(*sh(f"cat; seq 1 {LAST}; echo err >&2; exit 41"), input=b"in\n")
            assert result.stdout == b"in\n" + numbers(LAST), (kind, after)
            assert (result.stderr, result.exit_code, result.truncated) == (b"err\n", 41, False)
        assert proxy.faults
    chain.front.choose = chain.back.choose = Fault


async def input_and_files(far: RemoteBox) -> None:
    """They arrive whole, both ways."""
    data = os.urandom(1_000_000)
    with in_time(30):
        assert (await far.run("sha256sum", input=data)).text.split()[0] == hashlib.sha256(data).hexdigest()
        await far.files.write("/data", data)
        assert await far.files.read("/data") == data


async def killed_in_mid_stream(chain: Chain, far: RemoteBox) -> None:
    """The runner is killed while a command writes, and started again; the box and its command have gone on."""
    sink = Sink()
    script = f"echo run >> /runs; seq 1 {LAST}; read x; echo $x; seq 1 {LAST}; exit 44"
    execution = await far.exec(*sh(script), stdin=True, stdout=sink)
    with in_time(40):
        for size in (1000, 100_000):
            await until(lambda size=size: len(sink.data) > size)  # type: ignore[misc]
            chain.runner.kill()
            await anyio.to_thread.run_sync(chain.runner.start)
        await execution.stdin.write(b"between\n")
        result = await execution.wait()
    assert bytes(sink.data) == numbers(LAST) + b"between\n" + numbers(LAST)
    assert (result.exit_code, result.truncated) == (44, False)
    assert await far.files.read("/runs") == b"run\n"


async def forked_and_paused(far: RemoteBox) -> None:
    """A fork has memory and disk."""
    await far.run(*sh("echo memory > /dev/shm/file; echo disk > /file"))
    with in_time(60):
        fork = await far.fork("fork")
        assert (await fork.run("cat", "/dev/shm/file", "/file")).text == "memory\ndisk\n"
        await fork.pause()
        assert (await fork.info()).state is BoxState.PAUSED
        await fork.resume()
        assert (await fork.run("echo", "alive")).text == "alive\n"
        await fork.remove(force=True)


async def plain_box(chain: Chain, isolation: str, volume: str, **more: object) -> Any:
    """A box with a volume at /vol, made by somebody who speaks only HTTP."""
    body = {
        "image": IMAGE,
        "isolation": isolation,
        "volumes": [{"managed_volume": volume, "guest_path": "/vol"} | more],
    }
    async with httpx2.AsyncClient(base_url=chain.front.url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        answer = await client.post("/v1/boxes", json=body, timeout=30)
    assert answer.status_code == 201, answer.text
    return answer.json()


@pytest.mark.timeout(120)
async def test_a_vm_at_the_far_end(chain: Chain, tmp_path: Path) -> None:
    """One box for all, since it takes long to start."""
    async with RemoteRuntime(chain.front.url, KEY) as runtime:
        far = await runtime.create(IMAGE, isolation="vm")
        assert far.id in (tmp_path / "home/journal").read_text()
        assert (await far.run("uname", "-r")).text.strip() != os.uname().release
        await cut_once(chain, far)
        await input_and_files(far)
        await killed_in_mid_stream(chain, far)
        await forked_and_paused(far)
        await far.remove(force=True)


@pytest.mark.timeout(120)
async def test_vms_and_containers_share_a_volume(chain: Chain) -> None:
    """VMs, a container and a fork have the same files; who may only read is refused by the host."""
    async with RemoteRuntime(chain.front.url, KEY) as runtime:
        volume = await runtime.volumes.create("shared")
        made = [
            await plain_box(chain, "vm", volume.id),
            await plain_box(chain, "container", volume.name),
            await plain_box(chain, "vm", volume.name, read_only=True),
        ]
        assert [box["isolation"] for box in made] == ["vm", "container", "vm"]
        machine, container, reader = [await runtime.get(box["box_id"]) for box in made]
        with in_time(60):
            assert (await machine.run(*sh("echo machine > /vol/file; mkdir /vol/d; chown 7:8 /vol/d"))).ok
            assert (await container.run(*sh("echo container >> /vol/file; stat -c %u:%g /vol/d"))).text == "7:8\n"
            both = "machine\ncontainer\n"
            assert (await reader.run("cat", "/vol/file")).text == (await machine.run("cat", "/vol/file")).text == both
            refused = await reader.run(*sh("mount -o remount,rw /vol; echo x > /vol/x; rm /vol/file"))
            assert not refused.ok and b"ead-only" in refused.stderr
            # At once: what each appends stays whole.
            append = sh("for i in $(seq 50); do echo $(hostname) >> /vol/log; done")
            async with anyio.create_task_group() as tasks:
                for box in (machine, container):
                    tasks.start_soon(box.run, *append)
            lines = (await container.files.read("/vol/log")).decode().split()
            assert sorted(lines) == sorted(50 * [machine.id] + 50 * [container.id])
            await machine.files.write("/vol/big", NOISE)
            assert await container.files.read("/vol/big") == NOISE
            fork = await machine.fork("with-volume")
            await fork.run(*sh("echo fork > /vol/file"))
            assert (await reader.run("cat", "/vol/file")).text == "fork\n"
        with pytest.raises(InvalidStateError):
            await runtime.volumes.remove(volume.name)
        for box in (machine, container, reader, fork):
            await box.remove(force=True)
        await runtime.volumes.remove(volume.name)
