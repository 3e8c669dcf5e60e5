"""API and runner as separate processes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import httpx2
import pytest

from hutch.errors import (
    AlreadyExistsError,
    EngineError,
    ExecError,
    HutchError,
    NetworkError,
    NotFoundError,
    UnauthenticatedError,
    UnsupportedError,
    UpstreamUnavailableError,
)
from hutch.image import Credential
from hutch.image.logins import Logins
from hutch.runtime.runtime import LocalRuntime
from hutch.sdk.remote import RemoteRuntime
from hutch.types import BoxState, Secret
from tests.e2e.fleet import KEY, Fleet, api_process, joined, runner_process
from tests.leaks import holders, searched
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import Sink, in_time, sh, until

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.sdk.remote_box import RemoteBox
    from tests.remote.processes import Process

pytestmark = [pytest.mark.root, pytest.mark.anyio]

LAST = 200_000


def _longer(sink: Sink, size: int) -> bool:
    return len(sink.data) > size


def numbers(last: int = LAST) -> bytes:
    """What ``seq 1 last`` writes."""
    return b"".join(b"%d\n" % n for n in range(1, last + 1))


async def test_the_path_check_bites(fleet: Fleet, runtime: RemoteRuntime, tmp_path: Path, images: Path) -> None:
    await runtime.create(IMAGE)
    fleet.check_path()
    other = tmp_path / "other"
    other.mkdir()
    (other / "images").symlink_to(images)
    async with LocalRuntime(other) as local:
        bypassing = await local.create(IMAGE)
        fleet.made.add(bypassing.id)
        with pytest.raises(AssertionError, match="never passed the runner"):
            fleet.check_path()
        fleet.made.discard(bypassing.id)
        await bypassing.remove()


async def test_a_box_lives_on_the_runner(fleet: Fleet, runtime: RemoteRuntime, tmp_path: Path) -> None:
    box = await runtime.create(IMAGE, name="far", labels={"a": "b"})
    assert box.id in fleet.journal()
    result = await box.run(*sh("read x; echo $x; echo err >&2; exit 3"), input=b"in\n")
    assert (result.stdout, result.stderr, result.exit_code) == (b"in\n", b"err\n", 3)
    with pytest.raises(ExecError, match="nope"):
        await box.run("nope")
    await box.files.write("/data", b"text")
    assert await box.files.read("/data") == b"text"
    assert (await runtime.get("far")).id == (await runtime.get(box.id[:6])).id == box.id
    assert [info.id for info in await runtime.list(labels={"a": "b"})] == [box.id]
    assert await runtime.list(labels={"a": "c"}) == []
    with pytest.raises(AlreadyExistsError):
        await runtime.create(IMAGE, name="far")
    twin = await box.clone("twin")
    assert (await twin.run("cat", "/data")).stdout == b"text"
    await box.export(tmp_path / "box.tar")
    third = await runtime.import_box(tmp_path / "box.tar", name="third")
    assert (await third.run("cat", "/data")).stdout == b"text"
    await box.remove(force=True)
    with pytest.raises(NotFoundError):
        await runtime.get("far")
    again = await runtime.create(IMAGE, name="far")
    assert {again.id, twin.id, third.id} <= fleet.journal()


async def test_volumes_images_and_a_main_command(fleet: Fleet, runtime: RemoteRuntime) -> None:
    from hutch.types import Mount

    assert [image.references for image in await runtime.images.list()] == [(IMAGE,)]
    await runtime.volumes.create("shared")
    assert [volume.name for volume in await runtime.volumes.list()] == ["shared"]
    job = await runtime.create(
        IMAGE, command=sh("echo kept > /v/file; seq 1 5; exit 7"), mounts=[Mount(target="/v", volume="shared")]
    )
    sink = Sink()
    result = await (await job.start_attached(stdout=sink)).wait()
    assert (bytes(sink.data), result.exit_code, await job.wait()) == (numbers(5), 7, 7)
    assert b"".join([entry.data async for entry in job.logs()]) == numbers(5)
    await job.remove()
    await runtime.volumes.remove("shared")
    with pytest.raises(NotFoundError):
        await runtime.volumes.get("shared")


@pytest.mark.parametrize("who", ["api", "runner", "both"])
async def test_killed_in_mid_stream_and_started_again_nothing_is_lost(
    fleet: Fleet, runtime: RemoteRuntime, box: RemoteBox, who: str
) -> None:
    victims = [fleet.api, fleet.runner] if who == "both" else [getattr(fleet, who)]
    sink = Sink()
    script = f"echo run >> /runs; seq 1 {LAST}; read x; echo $x; seq 1 {LAST}; exit 44"
    execution = await box.exec(*sh(script), stdin=True, stdout=sink)
    with in_time(40):
        for size in (1000, 500_000):
            await until(functools.partial(_longer, sink, size))
            for victim in victims:
                victim.kill()
            async with anyio.create_task_group() as tasks:
                for victim in victims:
                    tasks.start_soon(anyio.to_thread.run_sync, victim.start)
        await execution.stdin.write(b"between\n")
        result = await execution.wait()
        await joined(runtime)
    assert bytes(sink.data) == numbers() + b"between\n" + numbers()
    assert (result.exit_code, result.truncated) == (44, False)
    assert await box.files.read("/runs") == b"run\n"


async def test_without_a_runner_nothing_is_made_here(fleet: Fleet, runtime: RemoteRuntime, box: RemoteBox) -> None:
    fleet.runner.kill()
    with in_time(30):
        with pytest.raises(UpstreamUnavailableError):
            await box.run("true")

        async def refused() -> bool:
            try:
                await runtime.create(IMAGE)
            except EngineError:
                return True
            except HutchError:
                return False
            raise AssertionError("a box was made without a runner")

        await until(refused)
        assert [info.state for info in await runtime.list()] == [BoxState.UNKNOWN]
        fleet.runner.start()
        await joined(runtime)
        assert (await box.run("echo", "back")).stdout == b"back\n"


async def test_without_a_runner_creation_is_503(tmp_path: Path) -> None:
    """Nor does it fall back to the API's own machine, which has no home for boxes at all."""
    with api_process(tmp_path) as api:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx2.AsyncClient(base_url=api.url, headers=headers, timeout=20) as http:
            answer = await http.post("/v1/boxes", json={"image": IMAGE})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
            assert (await http.get("/v1/boxes")).json()["boxes"] == []
        assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {"fleet"}


async def test_the_runner_with_the_fewest_boxes_gets_the_next(
    fleet: Fleet, runtime: RemoteRuntime, tmp_path: Path, images: Path
) -> None:
    second = tmp_path / "second"
    second.mkdir(mode=0o700)
    (second / "images").symlink_to(images)
    with runner_process(fleet.api, second) as process:
        fleet.homes.append(second)
        await joined(runtime, 2)
        for _ in range(4):
            await (await runtime.create(IMAGE)).start()
        other = Fleet(fleet.api, process, second).journal()
        assert len(other) == 2
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)


async def test_images_have_names_and_logins_on_every_runner(
    fleet: Fleet, runtime: RemoteRuntime, home: Path, tmp_path: Path, images: Path
) -> None:
    tagged = await runtime.images.tag(IMAGE, "other:1")
    assert "other:1" in tagged.references
    assert await (await runtime.create("other:1")).files.read("/etc/release") == b"hutch test image\n"
    assert list(await runtime.images.remove("other:1")) == ["other:1"]
    login = await runtime.images.login("registry.example", "ann", "secret-word", prefix="team")
    assert await runtime.images.logins() == [login]
    with pytest.raises(AlreadyExistsError, match=login.id):
        await runtime.images.login("registry.example", "bob", "x", prefix="team")
    assert Logins(home / "registries.json").find("registry.example", "team/tool") == Credential("ann", "secret-word")
    # One that joins later has missed nothing.
    second = tmp_path / "second"
    second.mkdir(mode=0o700)
    (second / "images").symlink_to(images)
    with runner_process(fleet.api, second):
        await joined(runtime, 2)
        assert Logins(second / "registries.json").find("registry.example", "team/x") is not None
        await runtime.images.logout(login.id)
        for place in (home, second):
            assert Logins(place / "registries.json").entries() == []
    with pytest.raises(NotFoundError):
        await runtime.images.logout(login.id)


async def test_memory_that_ran_out_is_told(runtime: RemoteRuntime) -> None:
    box = await runtime.create(IMAGE, memory_mib=128)
    with in_time(40):
        result = await box.run(*sh("x=0123456789; while :; do x=$x$x; done"))
    assert (result.exit_code, result.oom_killed) == (-9, True)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["api"], "--token"),
        (["api", "--token", "t", "--host", "0.0.0.0"], "--api-key"),
        (["runner", "--token", "t"], "--join"),
        (["runner", "--join", "http://localhost:1"], "--token"),
        (["api", "--token", "t", "--port", "x"], "--port"),
        (["--read-only-key", "a b", "--api-key", "k", "--port", "0"], "printable"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, words: list[str], option: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hutch", "serve", *words],
        capture_output=True,
        text=True,
        timeout=20,
        env={"PATH": os.environ["PATH"], "HUTCH_HOME": str(tmp_path / "home")},
    )
    assert done.returncode in (1, 2) and option in done.stderr and "Traceback" not in done.stderr, done.stderr


async def test_keys_and_tokens(api: Process, fleet: Fleet) -> None:
    for key in (None, "wrong", "a-token-for-runners"):
        async with RemoteRuntime(api.url, key) as runtime:
            with pytest.raises(UnauthenticatedError):
                await runtime.list()
    async with RemoteRuntime(fleet.runner.url, KEY) as past:  # a client's key opens no runner
        with pytest.raises(UnauthenticatedError):
            await past.list()
        with pytest.raises(UnauthenticatedError):
            await past.http.call("POST", "/v1/x/runners", object, {})
    await anyio.lowlevel.checkpoint()


async def test_ports_and_networks_of_a_box_on_the_runner(runtime: RemoteRuntime) -> None:
    box = await runtime.create(IMAGE, network=["192.0.2.0/24", "*.example.com:443"])
    await box.exec("nc", "-ll", "-p", "8080", "-e", "cat")
    with in_time():
        while True:
            try:
                tunnel = await box.ports.connect(8080)
                break
            except NetworkError as error:
                assert "Connection refused" in str(error)  # not yet
        async with tunnel:
            await tunnel.send(b"there and back")
            await tunnel.end()
            received = b""
            while piece := await tunnel.receive():
                received += piece
            assert received == b"there and back"
    assert not (await box.run("nc", "-w", "5", "198.51.100.9", "80", input=b"x")).stdout
    assert [refusal.peer for refusal in await box.network.log()] == ["198.51.100.9:80"]
    assert (await box.network.update("enabled")).outbound == "enabled"
    assert (await box.network.get()).outbound == "enabled"
    with pytest.raises(UnsupportedError, match="lets no box reach"):
        await box.network.update(allow=["169.254.169.254"])
    tunnel = await box.ports.connect(8080)
    await box.stop(timeout=0)
    with in_time(), pytest.raises(HutchError):
        while await tunnel.receive():
            pass
    await tunnel.close()


async def test_neither_api_nor_runner_keeps_the_value_of_a_secret(
    fleet: Fleet, runtime: RemoteRuntime, home: Path, api_folder: Path
) -> None:
    value = "tr3asure-77be01"
    box = await runtime.create(IMAGE, secrets=[Secret(name="API_KEY", value=value, hosts=("a.com",))])
    assert (await box.run(*sh("echo $API_KEY"))).text == "<HUTCH_SECRET:API_KEY>\n"  # the control
    assert api_folder / "fleet.db" in searched(api_folder) and home / "hutch.db" in searched(home)
    assert holders(value, home, api_folder, processes=(fleet.api.pid, fleet.runner.pid)) == []
