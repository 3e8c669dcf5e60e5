"""The door of boxes that an ordinary user makes."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.ordinary_user import NAME

if TYPE_CHECKING:
    from pathlib import Path

    from tests.net.world import World
    from tests.ordinary_user import OrdinaryUser

pytestmark = pytest.mark.root

BOX = """
import os, pathlib, sys, anyio
os.environ["HUTCH_DNS"] = sys.argv[2]
from hutch.runtime.runtime import LocalRuntime
from tests import rootfs
from tests.net.conftest import call, get, get_tls
from tests.net.world import GOOD, GOOD6, OTHER

async def main(here, ca, isolation):
    async with LocalRuntime(here / "home") as runtime:
        await runtime.images.load(rootfs.build(here / "image"), reference="busybox:test")
        rules = ["good.test", "[%s]:80" % GOOD6]
        box = await runtime.create("busybox:test", network=rules, ports=[8080], isolation=isolation)
        await box.start()
        print(await get(box, OTHER, "good.test"))
        print(await get_tls(box, OTHER, "good.test", ca))
        print(await get(box, GOOD6, "anything"))
        print("no rule" in await get(box, OTHER, "other.test"))
        for command in ("ip link set lo down", "ip addr add 198.51.100.7/24 dev lo", "ip route del default"):
            if isolation == "container":  # in a VM they harm the box alone
                print((await box.run(*command.split())).exit_code != 0)
        await box.exec("nc", "-ll", "-p", "8080", "-e", "cat")
        port = (await box.network.get()).ports[0].host_port
        with anyio.fail_after(10):
            while True:
                async with await anyio.connect_tcp("127.0.0.1", port) as stream:
                    await stream.send(b"published")
                    try:
                        print((await stream.receive()).decode())
                        break
                    except (anyio.EndOfStream, anyio.BrokenResourceError):
                        await anyio.sleep(0.05)
        await box.network.update("disabled")
        print(repr(await get(box, GOOD, "good.test")))
        await box.remove(force=True)
        print("Traceback" in (here / "home/gateway.log").read_text())

anyio.run(main, pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[3]), sys.argv[4])
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("isolation", ["container", "vm"])
def test_policies_hold_for_an_ordinary_user(
    ordinary_user: OrdinaryUser, internet: World, vm_store: Path, isolation: str
) -> None:
    place = ordinary_user.folder("net")
    if isolation == "vm":
        _give_kernel(place / "home", vm_store)
    subprocess.run(["cp", internet.ca, place / "ca.pem"], check=True)
    subprocess.run(["chmod", "644", place / "ca.pem"], check=True)
    output = ordinary_user.run("-c", BOX, str(place), "198.51.100.53", str(place / "ca.pem"), isolation, seconds=100)
    assert output.splitlines() == [
        "198.51.100.10 good.test /",
        "198.51.100.10 good.test /",
        "2001:db8:1::10 anything /",
        "True",
        *(["True"] * 3 if isolation == "container" else []),
        "published",
        "''",
        "False",
    ]


DATAGRAMS = """
import os, pathlib, shutil, sys, anyio
from hutch.runtime.runtime import LocalRuntime
from hutch.types import PublishedPort
from tests import rootfs
from tests.net.world import GOOD, GOOD6, OTHER

async def main(here):
    tree = rootfs.build(here / "image")
    shutil.copy(here / "talk", tree / "bin/talk")
    async with LocalRuntime(here / "home") as runtime:
        await runtime.images.load(tree, reference="busybox:test")
        port = PublishedPort(port=8080, protocol="udp")
        box = await runtime.create("busybox:test", network=[GOOD, GOOD6], ports=[port])
        for address in (GOOD, GOOD6, OTHER):
            print((await box.run("talk", "udp", address, "9999", "10", input=b"hello")).stdout)
        print((await box.run("talk", "raw", OTHER, GOOD, "9999")).ok)
        server = await box.exec("talk", "echo", "8080")
        await anext(aiter(server.stdout))
        port = (await box.network.get()).ports[0].host_port
        async with await anyio.create_connected_udp_socket("127.0.0.1", port) as client:
            answer = None
            with anyio.fail_after(20):
                while answer is None:
                    await client.send(b"published")
                    with anyio.move_on_after(1):
                        answer = await client.receive()
            print(answer)
        await box.remove(force=True)
        print("Traceback" in (here / "home/gateway.log").read_text())

anyio.run(main, pathlib.Path(sys.argv[1]))
"""


def test_datagrams_of_an_ordinary_user(ordinary_user: OrdinaryUser, internet: World, talk: Path) -> None:
    place = ordinary_user.folder("udp")
    subprocess.run(["install", "-m", "755", talk, place / "talk"], check=True)
    internet.reset()
    output = ordinary_user.run("-c", DATAGRAMS, str(place))
    assert output.splitlines() == ["b'hello'", "b'hello'", "b''", "False", "b'published'", "False"]
    assert internet.datagrams == [b"hello", b"hello"]


FORK = """
import os, pathlib, sys, anyio
from hutch.runtime.runtime import LocalRuntime
from hutch.types import Mount, PublishedPort
from tests import rootfs
from tests.net.conftest import get
from tests.net.world import GOOD, OTHER

async def main(here):
    shared = here / "shared"
    shared.mkdir()
    async with LocalRuntime(here / "home") as runtime:
        await runtime.images.load(rootfs.build(here / "image"), reference="busybox:test")
        mount = Mount(target="/shared", source=str(shared))
        parent = await runtime.create(
            "busybox:test", isolation="vm", network=[GOOD], ports=[PublishedPort(port=8080)], mounts=[mount]
        )
        writer = await parent.exec("sh", "-c", "exec > /shared/lines; while read line; do echo $line; done", stdin=True)
        await writer.stdin.write(b"parent\\n")
        outward = await parent.exec("nc", GOOD, "7777")  # it only reads: nothing but the cut can end it
        child = await parent.fork("child")
        twin = await child.attach(writer.id)
        cut = await child.attach(outward.id)
        with anyio.fail_after(20):
            await cut.wait()
        await twin.stdin.write(b"child\\n")
        await twin.stdin.close()
        with anyio.fail_after(20):
            print((await twin.wait()).exit_code)
        print((shared / "lines").read_bytes())
        for box in (parent, child):
            print(await get(box, GOOD, "x"), repr(await get(box, OTHER, "x")))
        ports = [(await box.network.get()).ports[0].host_port for box in (parent, child)]
        print(0 not in ports and ports[0] != ports[1])
        print([info.state.value for info in await runtime.list()])
        await child.remove(force=True)
        await parent.remove(force=True)
        print("Traceback" in (here / "home/gateway.log").read_text())

anyio.run(main, pathlib.Path(sys.argv[1]))
"""


@pytest.mark.timeout(120)
def test_a_fork_of_an_ordinary_user(ordinary_user: OrdinaryUser, internet: World, vm_store: Path) -> None:
    """With a network and a mount: the file that was open is written by both, the connection is cut in the fork."""
    place = ordinary_user.folder("fork")
    _give_kernel(place / "home", vm_store)
    output = ordinary_user.run("-c", FORK, str(place), seconds=100)
    assert output.splitlines() == [
        "0",
        "b'parent\\nchild\\n'",
        *(["198.51.100.10 x / ''"] * 2),
        "True",
        "['running', 'running']",
        "False",
    ]


def _give_kernel(home: Path, store: Path) -> None:
    shutil.copytree(store / "kernels", home / "vm/kernels", ignore=shutil.ignore_patterns("lock"))
    subprocess.run(["chown", "-R", NAME, home], check=True)
