"""What the published client must be able to do, driven by that client itself, in a process of its own (its native
part may abort when the interpreter ends).

usage: cases.py CASE URL [COUNT]

A server that asks for a key gets the one in BOXLITE_API_KEY.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import boxlite  # type: ignore[import-untyped]
from boxlite import ApiKeyCredential, Boxlite, BoxliteRestOptions, BoxOptions

IMAGE = "busybox:test"
# Waits until somebody listens at 8080 and 8081.
LISTENING = "for i in $(seq 100); do [ $(netstat -ltn | grep -c ':808[01]') = 2 ] && exit; sleep 0.05; done; exit 1"


class Outcome:
    """How a command ended."""

    def __init__(self, code: int, out: list[str], err: list[str], error: str | None) -> None:
        self.code, self.out, self.err, self.error = code, "".join(out), "".join(err), error


async def finish(execution: Any) -> Outcome:
    out: list[str] = []
    err: list[str] = []

    async def read(stream: Any, pieces: list[str]) -> None:
        pieces.extend([piece async for piece in stream])

    await asyncio.gather(read(execution.stdout(), out), read(execution.stderr(), err))
    result = await execution.wait()
    return Outcome(result.exit_code, out, err, result.error_message)


async def run(box: Any, *command: str, **options: Any) -> Outcome:
    return await finish(await box.exec(command[0], list(command[1:]), **options))


def options(url: str) -> BoxliteRestOptions:
    key = os.environ.get("BOXLITE_API_KEY")
    return BoxliteRestOptions(url=url, credential=ApiKeyCredential(key) if key else None)


def connect(url: str) -> Any:
    return Boxlite.rest(options(url))


async def raises(kind: type[BaseException], call: Any, text: str = "") -> None:
    try:
        await call
    except kind as error:
        assert text in str(error), error
        return
    raise AssertionError(f"{kind.__name__} was not raised")


async def life(url: str) -> None:
    runtime = connect(url)
    box = await runtime.create(BoxOptions(image=IMAGE, cpus=1, memory_mib=256, env=[("A", "1")]), name="life-1")
    info = await box.info()
    assert (info.id, info.name, info.image, info.cpus, info.memory_mib) == (box.id, "life-1", IMAGE, 1, 256)
    assert info.state.status == "configured" and not info.state.running
    assert info.auto_stop == 900 and info.auto_delete == 0 and info.auto_resume
    assert (info.network.outbound.mode, info.network.outbound.allow_net) == ("enabled", [])
    assert info.network.inbound.mode == "disabled" and info.network.published_ports == []
    await raises(boxlite.AlreadyExistsError, runtime.create(BoxOptions(image=IMAGE), name="life-1"))
    assert (await runtime.get("life-1")).id == box.id
    assert await runtime.get("life") is None
    assert await runtime.get("a b/c?d") is None
    again, created = await runtime.get_or_create(BoxOptions(image=IMAGE), name="life-1")
    assert not created and again.id == box.id
    await box.start()
    assert (await box.info()).state.running
    await run(box, "sh", "-c", "echo kept > /root/file")
    await box.stop()
    assert (await box.info()).state.status == "stopped"
    await raises(boxlite.StoppedError, run(box, "true"))
    await box.start()
    assert (await run(box, "cat", "/root/file")).out == "kept\n"
    assert box.id in [info.id for info in await runtime.list_info()]
    await raises(boxlite.InvalidStateError, runtime.remove("life-1"))
    await runtime.remove("life-1", force=True)
    await raises(boxlite.NotFoundError, runtime.remove("life-1", force=True))
    assert await runtime.get(box.id) is None


async def commands(url: str) -> None:
    runtime = connect(url)
    box = await runtime.create(BoxOptions(image=IMAGE))
    for code in (0, 1, 2, 42, 126, 127):
        assert (await run(box, "sh", "-c", f"exit {code}")).code == code
    both = await run(box, "sh", "-c", "echo out; echo err >&2")
    assert (both.code, both.out, both.err, both.error) == (0, "out\n", "err\n", None)
    assert (await run(box, "sh", "-c", "echo $A-$B", env=[("A", "1"), ("B", "")])).out == "1-\n"
    assert (await run(box, "pwd", cwd="/etc")).out == "/etc\n"
    assert (await run(box, "true")).out == ""
    text = "äöü€😀" * 20_000
    await box.exec("true", [])
    big = await run(box, "sh", "-c", f"i=0; while [ $i -lt 20 ]; do printf %s '{text[:2000]}'; i=$((i+1)); done")
    assert big.out == text[:2000] * 20
    await raises(boxlite.ExecutionError, run(box, "no-such-command"), "no-such-command")
    await raises(boxlite.ExecutionError, run(box, "true", cwd="/absent"), "/absent")
    tty = await run(box, "sh", "-c", "stty size; echo err >&2", tty=True)
    assert (tty.out, tty.err) == ("24 80\r\nerr\r\n", "")
    await runtime.remove(box.id, force=True)


async def endings(url: str) -> None:
    runtime = connect(url)
    box = await runtime.create(BoxOptions(image=IMAGE))
    begin = time.monotonic()
    late = await run(box, "sh", "-c", "echo before; sleep 60", timeout_secs=0.5)
    assert late.out == "before\n" and late.code == -15 and time.monotonic() - begin < 10
    stubborn = await run(box, "sh", "-c", "trap '' TERM; while :; do sleep 0.1; done", timeout_secs=0.3)
    assert stubborn.code == -9
    victim = await box.exec("sleep", ["60"])
    await victim.kill()
    assert (await victim.wait()).exit_code == -9
    await victim.kill()
    victim = await box.exec("sleep", ["60"])
    for wrong in (0, -1, 9, 19, 99):
        await raises(boxlite.InvalidArgumentError, victim.signal(wrong))
    await victim.signal(15)
    assert (await victim.wait()).exit_code == -15
    await raises(boxlite.InvalidStateError, victim.signal(15))
    plain = await box.exec("sleep", ["60"])
    await raises(boxlite.InvalidArgumentError, plain.resize_tty(10, 10))
    waiting = asyncio.ensure_future(plain.wait())
    await asyncio.sleep(0.2)
    await box.stop()
    assert (await asyncio.wait_for(waiting, 10)).exit_code < 0
    await runtime.remove(box.id, force=True)


async def terminals(url: str) -> None:
    runtime = connect(url)
    box = await runtime.create(BoxOptions(image=IMAGE))
    shell = await box.exec("sh", ["-c", "read a; stty size; read b; stty size"], tty=True)
    stdin = shell.stdin()
    await shell.resize_tty(40, 120)
    await stdin.send_input(b"x\n")
    stdout = shell.stdout()
    seen = ""
    while "40 120" not in seen:
        seen += await anext(stdout)
    await shell.resize_tty(50, 100)
    await stdin.send_input(b"y\n")
    async for piece in stdout:
        seen += piece
    assert "50 100" in seen
    assert (await shell.wait()).exit_code == 0
    await runtime.remove(box.id, force=True)


async def inputs(url: str) -> None:
    runtime = connect(url)
    box = await runtime.create(BoxOptions(image=IMAGE))
    echo = await box.exec("cat", [])
    stdin = echo.stdin()
    await stdin.send_input(b"hello ")
    await stdin.send_input(b"world\n")
    await stdin.close()
    assert (await finish(echo)).out == "hello world\n"
    large = await box.exec("cat", [])
    stdin = large.stdin()
    await stdin.send_input(b"x" * 20_000_000)
    await stdin.close()
    result = await finish(large)
    assert result.code == 0 and len(result.out) == 20_000_000
    early = await box.exec("sh", ["-c", "head -c 10 >/dev/null; exit 7"])
    stdin = early.stdin()
    await stdin.send_input(b"y" * 3_000_000)
    assert (await early.wait()).exit_code == 7
    await runtime.remove(box.id, force=True)


async def volume_of_output(url: str) -> None:
    runtime = connect(url)
    box = await runtime.create(BoxOptions(image=IMAGE))
    expected = "".join(f"{n}\n" for n in range(1, 1_000_000))[:5_000_000]
    whole = await run(box, "sh", "-c", "seq 1 1000000 | head -c 5000000")
    assert whole.code == 0 and whole.out == expected
    results = await asyncio.gather(*(run(box, "sh", "-c", f"echo {n}; echo {n} >&2; exit {n}") for n in range(50)))
    for number, result in enumerate(results):
        assert (result.code, result.out, result.err) == (number, f"{number}\n", f"{number}\n"), number
    slow = await box.exec("sh", ["-c", "seq 1 2000000 | head -c 10000000"])
    begin = time.monotonic()
    assert (await run(box, "echo", "quick")).out == "quick\n"
    assert time.monotonic() - begin < 5
    assert len((await finish(slow)).out) == 10_000_000
    await runtime.remove(box.id, force=True)


async def attaching(url: str) -> None:
    runtime = connect(url)
    box = await runtime.create(BoxOptions(image=IMAGE))
    first = await box.exec("sh", ["-c", "echo begin; read a; echo $a"])
    stdout = first.stdout()
    assert await anext(stdout) == "begin\n"
    await raises(boxlite.AlreadyExistsError, box.attach(execution_id=first.id()))
    await raises(boxlite.SessionReapedError, box.attach(execution_id="absent"))
    stdin = first.stdin()
    await stdin.send_input(b"end\n")
    assert await anext(stdout) == "end\n"
    assert (await first.wait()).exit_code == 0
    again = await finish(await box.attach(execution_id=first.id()))
    assert (again.code, again.out) == (0, "begin\nend\n")
    await runtime.remove(box.id, force=True)


async def main_command(url: str) -> None:
    runtime = connect(url)
    box = await runtime.create(BoxOptions(image=IMAGE, cmd=["sh", "-c", "echo ready; read a; echo got $a; exit 5"]))
    main = await box.attach()
    await box.start()
    stdout = main.stdout()
    assert await anext(stdout) == "ready\n"
    await main.stdin().send_input(b"it\n")
    assert await anext(stdout) == "got it\n"
    assert (await main.wait()).exit_code == 5
    for _ in range(100):
        info = await box.info()
        if info.state.status == "stopped":
            break
        await asyncio.sleep(0.05)
    assert info.state.exit_code == 5
    late = await finish(await box.attach(stdin=False))
    assert (late.code, late.out) == (5, "ready\ngot it\n")
    await raises(boxlite.StoppedError, run(box, "true"))
    await runtime.remove(box.id, force=True)
    plain = await runtime.create(BoxOptions(image=IMAGE))
    await raises(boxlite.NotFoundError, plain.attach())
    await runtime.remove(plain.id, force=True)


async def files(url: str) -> None:
    runtime = connect(url)
    box = await runtime.create(BoxOptions(image=IMAGE))
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        data = random.Random(1).randbytes(4 << 20)
        (here / "blob").write_bytes(data)
        (here / "blob").chmod(0o755)
        (here / "tree/deep/er").mkdir(parents=True)
        (here / "tree/deep/er/leaf").write_text("leaf")
        (here / "tree/empty").write_bytes(b"")
        (here / "tree/link").symlink_to("deep/er/leaf")
        await box.copy_in(str(here / "blob"), "/data/renamed")
        await box.copy_in(str(here / "blob"), "/root/")
        await box.copy_in(str(here / "blob"), "/etc")
        sums = await run(
            box, "sh", "-c", "md5sum < /data/renamed; md5sum < /root/blob; md5sum < /etc/blob; ls -l /data"
        )
        lines = sums.out.splitlines()
        assert len(set(lines[:3])) == 1 and "-rwxr-xr-x" in sums.out, sums.out
        await box.copy_in(str(here / "tree"), "/app")
        assert (await run(box, "cat", "/app/tree/link")).out == "leaf"
        await box.copy_in(f"{here}/tree/.", "/flat")
        assert (await run(box, "cat", "/flat/deep/er/leaf")).out == "leaf"
        await box.copy_out("/data/renamed", str(here / "back"))
        assert (here / "back").read_bytes() == data
        (here / "into").mkdir()
        await box.copy_out("/app/tree", str(here / "into"))
        assert (here / "into/tree/deep/er/leaf").read_text() == "leaf"
        assert (here / "into/tree/link").readlink() == Path("deep/er/leaf")
        await box.copy_out("/etc/release", str(here / "into"))
        assert (here / "into/release").read_text() == "hutch test image\n"
        await raises(boxlite.NotFoundError, box.copy_out("/absent", str(here / "x")))
    await runtime.remove(box.id, force=True)


async def copies(url: str) -> None:
    runtime = connect(url)
    box = await runtime.create(BoxOptions(image=IMAGE), name="origin")
    await run(box, "sh", "-c", "echo one > /root/state")
    saved = await box.snapshot.create(name="first")
    assert saved.name == "first" and saved.box_id == box.id and abs(saved.created_at - time.time()) < 60
    assert [item.name for item in await box.snapshot.list()] == ["first"]
    assert (await box.snapshot.get("first")).id == saved.id
    assert await box.snapshot.get("a/b") is None
    await run(box, "sh", "-c", "echo two > /root/state")
    await raises(boxlite.InvalidStateError, box.snapshot.restore("first"))
    clone = await box.clone_box(name="copy")
    assert (await run(clone, "cat", "/root/state")).out == "two\n"
    with tempfile.TemporaryDirectory() as name:
        path = await box.export(dest=name)
        assert Path(path).name == "origin.boxlite"
        imported = await runtime.import_box(path)
        assert (await run(imported, "cat", "/root/state")).out == "two\n"
        (Path(name) / "junk").write_bytes(b"junk")
        await raises(boxlite.InvalidArgumentError, runtime.import_box(str(Path(name) / "junk")))
    await box.stop()
    await box.snapshot.restore("first")
    await box.start()
    assert (await run(box, "cat", "/root/state")).out == "one\n"
    await box.snapshot.remove("first")
    await raises(boxlite.NotFoundError, box.snapshot.remove("first"))
    for other in (box, clone, imported):
        await runtime.remove(other.id, force=True)


async def volumes(url: str) -> None:
    runtime = connect(url)
    volume = await runtime.volumes.create("shared")
    assert volume.name == "shared"
    nameless = await runtime.volumes.create()
    assert {volume.id, nameless.id} <= {item.id for item in await runtime.volumes.list()}
    mounts = [{"managed_volume": "shared", "guest_path": "/data"}]
    writer = await runtime.create(BoxOptions(image=IMAGE, volumes=mounts))
    await run(writer, "sh", "-c", "echo hello > /data/note")
    reader = await runtime.create(BoxOptions(image=IMAGE, volumes=[{**mounts[0], "managed_volume": volume.id}]))
    assert (await run(reader, "cat", "/data/note")).out == "hello\n"
    await raises(boxlite.InvalidStateError, runtime.volumes.remove(volume.id))
    await runtime.remove(writer.id, force=True)
    await runtime.remove(reader.id, force=True)
    await runtime.volumes.remove(volume.id)
    await runtime.volumes.remove(nameless.id)
    await raises(boxlite.NotFoundError, runtime.volumes.get(volume.id))


async def images_and_metrics(url: str) -> None:
    runtime = connect(url)
    rows = await runtime.images.list()
    assert any(row.repository.endswith("busybox") and row.tag == "test" for row in rows), rows
    detail = await runtime.images.get(next(row.repository for row in rows))
    assert detail.versions[0].digest.startswith("sha256:")
    usage = await runtime.images.usage()
    assert usage.count >= 1 and usage.known_bytes > 0
    await raises(boxlite.NotFoundError, runtime.images.get("docker.io/library/absent"))
    digest = detail.versions[0].digest
    tagged = await runtime.images.create_alias(detail.name, "also", digest)
    assert set(tagged.aliases) == {"test", "also"}
    assert [(change.alias, change.to_digest) for change in tagged.history][:1] == [("also", digest)]
    await runtime.images.delete_alias(detail.name, "also")
    assert (await runtime.images.get(detail.name)).aliases == ["test"]
    assert await runtime.images.registries.list() == []
    login = await runtime.images.registries.create(
        registry_host="registry.example", username="ann", password="secret-word", repository_prefix="team"
    )
    (listed,) = await runtime.images.registries.list()
    assert (listed.id, listed.registry_host, listed.repository_prefix) == (login.id, "registry.example", "team")
    assert "secret-word" not in repr(listed)
    await runtime.images.registries.remove(login.id)
    await raises(boxlite.NotFoundError, runtime.images.registries.remove(login.id))
    before = await runtime.metrics()
    box = await runtime.create(BoxOptions(image=IMAGE))
    for _ in range(3):
        await run(box, "true")
    metrics = await box.metrics()
    assert metrics.commands_executed_total >= 3
    after = await runtime.metrics()
    assert after.boxes_created_total == before.boxes_created_total + 1
    assert after.total_commands_executed == before.total_commands_executed + 3
    await runtime.remove(box.id, force=True)


async def refusals(url: str) -> None:
    runtime = connect(url)
    names = [info.name for info in await runtime.list_info()]
    create = runtime.create
    await raises(boxlite.InvalidArgumentError, create(BoxOptions(image=IMAGE, cpus=200)), "cpus")
    await raises(boxlite.InvalidArgumentError, create(BoxOptions(image=IMAGE, memory_mib=1)), "memory_mib")
    await raises(boxlite.InvalidArgumentError, create(BoxOptions(image=IMAGE, disk_size_gb=99_999_999)), "disk_size_gb")
    await raises(boxlite.InvalidArgumentError, create(BoxOptions(image=IMAGE, auto_stop=59)), "60")
    await raises(boxlite.InvalidArgumentError, create(BoxOptions(image=IMAGE), name="a b/c?d"), "name")
    await raises(boxlite.UnsupportedError, create(BoxOptions(rootfs_path="/etc")), "rootfs_path")
    for special in ("127.0.0.1", "169.254.169.254", "host.hutch.internal"):
        host = boxlite.NetworkSpec(mode="enabled", allow_net=[special])
        await raises(boxlite.UnsupportedError, create(BoxOptions(image=IMAGE, network=host)), special)
    useless = boxlite.Secret(name="A", value="horse-shoe", hosts=[])
    await raises(boxlite.InvalidArgumentError, create(BoxOptions(image=IMAGE, secrets=[useless])), "secrets.0.hosts")
    assert [info.name for info in await runtime.list_info()] == names
    box = await runtime.create(BoxOptions(image=IMAGE))
    await raises(boxlite.StoppedError, box.network.tunnel(80), "does not run")
    await runtime.remove(box.id, force=True)
    await raises(boxlite.NotFoundError, run(box, "true"))


async def network(url: str) -> None:
    runtime = connect(url)
    mixed = boxlite.NetworkSpec(
        outbound=boxlite.OutboundNetworkSpec(mode="enabled", allow_net=["192.0.2.99", "*.example.com"]),
        inbound=boxlite.InboundNetworkSpec(mode="enabled"),
    )
    key = boxlite.Secret(name="openai", value="horse-shoe", hosts=["api.example.com"])
    box = await runtime.create(BoxOptions(image=IMAGE, network=mixed, secrets=[key]))

    async def shown() -> tuple[str, list[str], str]:
        state = (await box.info()).network
        return state.outbound.mode, state.outbound.allow_net, state.inbound.mode

    assert await shown() == ("enabled", ["192.0.2.99", "*.example.com"], "enabled")
    assert (await run(box, "sh", "-c", "echo $BOXLITE_SECRET_openai $openai")).out.split() == 2 * [
        key.get_placeholder()
    ]
    assert "horse" not in (await run(box, "env")).out
    assert (await run(box, "sh", "-c", "wc -l < /proc/net/route")).out == "2\n"
    await box.network.update_outbound(boxlite.OutboundNetworkSpec(mode="enabled", allow_net=["192.0.2.0/24"]))
    await box.network.update_inbound(boxlite.InboundNetworkSpec(mode="disabled"))
    assert await shown() == ("enabled", ["192.0.2.0/24"], "disabled")
    await box.network.update_outbound(boxlite.OutboundNetworkSpec(mode="enabled"))
    assert await shown() == ("enabled", [], "disabled")
    await box.network.update_outbound(boxlite.OutboundNetworkSpec(mode="disabled"))
    assert await shown() == ("disabled", [], "disabled")
    await runtime.remove(box.id, force=True)
    none = boxlite.NetworkSpec(mode="disabled")
    box = await runtime.create(BoxOptions(image=IMAGE, network=none))
    assert await shown() == ("disabled", [], "disabled")
    assert (await run(box, "sh", "-c", "wc -l < /proc/net/route")).out == "1\n"
    await runtime.remove(box.id, force=True)


async def published_ports(url: str) -> None:
    """The client cannot ask for ports, but it reads what a box has."""
    runtime = connect(url)
    (info,) = await runtime.list_info()
    box = await runtime.get(info.id)
    told = [
        (port.guest_port, port.host_ip, port.protocol, port.host_port > 0)
        for port in (await box.info()).network.published_ports
    ]
    assert told == [(8080, "127.0.0.2", "tcp", True), (53, "127.0.0.2", "udp", True)], told
    assert (await box.metrics()).network_bytes_sent == 5


async def tunnels(url: str) -> None:
    runtime = connect(url)
    box = await runtime.create(BoxOptions(image=IMAGE, network=boxlite.NetworkSpec(mode="disabled")))
    await box.start()
    for port in (8080, 8081):
        await box.exec("nc", ["-ll", "-p", str(port), "-e", "cat"])
    assert (await run(box, "sh", "-c", LISTENING)).code == 0
    data = os.urandom(2 << 20)
    connection = await (await box.network.tunnel(8080)).connect()

    async def send() -> None:
        await connection.write(data)
        await connection.shutdown_write()

    async def receive(from_: Any) -> bytes:
        received = b""
        while piece := await from_.read(1 << 16):
            received += piece
        return received

    sent = asyncio.ensure_future(send())
    assert await asyncio.wait_for(receive(connection), 20) == data  # also after the half-close
    await sent
    nobody = await box.network.tunnel(99)
    await raises(boxlite.NetworkError, nobody.connect(), "Connection refused")
    forwarder = await (await box.network.tunnel(8081)).forward(boxlite.SocketAddress.tcp("127.0.0.1", 0))
    address = forwarder.local_addr()

    opened = []
    for number in range(60):  # of its 64; one after the other: few may wait until busybox takes them
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(b"%3d" % number)
        assert await asyncio.wait_for(reader.readexactly(3), 20) == b"%3d" % number
        opened.append((reader, writer))

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"the rest")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 20) == b"the rest"
        writer.close()

    await asyncio.gather(*(one(*streams) for streams in opened))
    kept = await (await box.network.tunnel(8081)).connect()
    other = await (await box.network.tunnel(8080)).connect()
    for open_ in (kept, other):
        await open_.write(b"x")
        assert await open_.read(1) == b"x"
    stale = await box.network.tunnel(8081)
    await box.network.revoke_tunnel(8081)
    await raises(boxlite.NetworkError, asyncio.wait_for(kept.read(1), 10))
    await raises(boxlite.BoxliteError, stale.connect())
    await other.write(b"y")
    assert await other.read(1) == b"y"
    await box.stop()
    await raises(boxlite.NetworkError, asyncio.wait_for(other.read(1), 10))
    await raises(boxlite.StoppedError, box.network.tunnel(8080))
    await runtime.remove(box.id, force=True)


async def simple_box(url: str) -> None:
    runtime = connect(url)
    async with boxlite.SimpleBox(image=IMAGE, runtime=runtime) as box:
        result = await box.exec("sh", "-c", "echo $X; exit 3", env={"X": "y"})
        assert (result.exit_code, result.stdout) == (3, "y\n")
        box_id = box.id
    await runtime.remove(box_id, force=True)


def sync_simple_box(url: str) -> None:
    with boxlite.SyncBoxlite.rest(options(url)) as runtime:
        with boxlite.SyncSimpleBox(image=IMAGE, runtime=runtime) as box:
            result = box.exec("echo", "sync")
            assert (result.exit_code, result.stdout) == (0, "sync\n")
            box_id = box.id
        runtime.remove(box_id, force=True)


class Cutter:
    """A TCP proxy that cuts connections on which the server says the words, and lets none of them through: the first
    one, or such a share of them."""

    def __init__(self, url: str, words: bytes, share: float | None = None) -> None:
        self.port = int(url.rpartition(":")[2])
        self.words = words
        self.cuts = 0
        self.share = share
        self.chance = random.Random(1)

    @property
    def strikes(self) -> bool:
        """Whether the next connection is cut."""
        return not self.cuts if self.share is None else self.chance.random() < self.share

    async def start(self) -> str:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up, down = await asyncio.open_connection("127.0.0.1", self.port)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, watch: bool) -> None:
            try:
                while data := await source.read(65536):
                    if watch and self.words in data and self.strikes:
                        self.cuts += 1
                        break
                    target.write(data)
                    await target.drain()
            except OSError:
                pass
            finally:
                writer.transport.abort()
                down.transport.abort()

        await asyncio.gather(pump(reader, down, False), pump(up, writer, True))


async def cut_before_exit(url: str) -> None:
    """The connection breaks between the output and the exit frame: at once, and with everything."""
    proxy = Cutter(url, b'"type":"exit"')
    runtime = connect(await proxy.start())
    box = await runtime.create(BoxOptions(image=IMAGE))
    begin = time.monotonic()
    result = await run(box, "sh", "-c", "seq 1 2000; exit 4")
    assert proxy.cuts == 1
    assert result.code == 4 and result.out == "".join(f"{n}\n" for n in range(1, 2001))
    assert time.monotonic() - begin < 5
    await runtime.remove(box.id, force=True)


async def cut_before_output(url: str) -> None:
    """The connection breaks before the last output arrives, and the command has ended: the client comes back."""
    proxy = Cutter(url, b"the-last-words")
    runtime = connect(await proxy.start())
    box = await runtime.create(BoxOptions(image=IMAGE))
    result = await run(box, "sh", "-c", "echo the-last-words; exit 6")
    assert proxy.cuts == 1
    assert (result.code, result.out) == (6, "the-last-words\n"), (result.code, result.out, result.error)
    await runtime.remove(box.id, force=True)


async def census(url: str, count: int = 200) -> None:
    """Many short commands, eight at a time: every output is what it should be."""
    await take_census(url, count)


async def census_with_cuts(url: str, count: int = 200) -> None:
    """The same, while every third connection breaks between the end of the command and the exit frame."""
    proxy = Cutter(url, b'"type":"exit"', share=1 / 3)
    await take_census(await proxy.start(), count)
    assert proxy.cuts > count // 5


async def take_census(url: str, count: int) -> None:
    runtime = connect(url)
    box = await runtime.create(BoxOptions(image=IMAGE))
    await run(box, "sh", "-c", "seq 1 100000 > /numbers")
    numbers = "".join(f"{n}\n" for n in range(1, 100_001))
    left = list(range(count))
    wrong: list[str] = []

    async def work() -> None:
        while left:
            number = left.pop()
            size = (0, 1, 20, 4096, 70_000, 300_000)[number % 6]
            script = (
                f"echo {number} >>/ran; head -c {size} /numbers; echo {number}; echo {number} >&2; exit {number % 99}"
            )
            result = await run(box, "sh", "-c", script)
            expected = numbers[:size] + f"{number}\n"
            if (result.code, result.out, result.err) != (number % 99, expected, f"{number}\n"):
                wrong.append(f"{number}: {result.code}, {len(result.out)} of {len(expected)} bytes, {result.error}")

    await asyncio.gather(*(work() for _ in range(8)))
    assert not wrong, wrong[:10]
    ran = (await run(box, "sort", "-n", "/ran")).out
    assert ran == "".join(f"{number}\n" for number in range(count)), "a command was run twice, or never"
    await runtime.remove(box.id, force=True)


if __name__ == "__main__":
    case = globals()[sys.argv[1]]
    try:
        if asyncio.iscoroutinefunction(case):
            more = [int(word) for word in sys.argv[3:]]
            asyncio.run(asyncio.wait_for(case(sys.argv[2], *more), 50 if not more else more[0] / 2))
        else:
            case(sys.argv[2])
        sys.stdout.write("passed\n")
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
