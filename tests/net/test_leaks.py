"""A secret's value is nowhere but where it must be: in the memory of the gateway and of the process that made the box,
and at its host. A marker, which the box has and which goes wherever something of a box goes, proves that the search
works."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.host.proc import poll_until
from hutch.runtime.runtime import LocalRuntime
from hutch.types import Secret
from tests.leaks import forms, holders, processes, searched, shows
from tests.net.conftest import IMAGE, call_tls, gateways, get_tls
from tests.net.test_http2 import connected
from tests.net.world import GOOD, NOWHERE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hutch.runtime.box import LocalBox
    from tests.net.world import World

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(120)]

VALUE = 'tr3a/s"ure\\9b+1f6c=&x'
MARKER = 'br3a/d"crumb\\7e+2d5a=&y'
MARK = "<HUTCH_SECRET:API_KEY>"
CUT = 8444
SECRET = Secret(name="API_KEY", value=VALUE, hosts=("good.test", f"good.test:{CUT}", "nowhere.test"))
_LOUD = """
import logging, os
logging.basicConfig(level=logging.DEBUG, filename=os.path.join(os.environ["LOUD"], f"{os.getpid()}.log"))
"""


def loud(folder: Path) -> dict[str, str]:
    """An environment in which all Python programs log all that they and their libraries can tell, into the folder."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_LOUD)
    places = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"LOUD": str(folder), "PYTHONPATH": os.pathsep.join(places)}


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the logs."""
    for name, value in loud(tmp_path / "loud").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "loud"


@contextlib.contextmanager
def _cutting(world: World) -> Iterator[None]:
    """A server that breaks off in the middle of its answer."""

    def cut(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")

    listener = world.serve(GOOD, CUT, lambda connection: world.under_tls(connection, cut))
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


async def _say(box: LocalBox, ca: Path, *said: str, name: str = "good.test", port: int = 443) -> bytes:
    """Say something to a host of the secret; returns all that the box is told."""
    caller = await call_tls(box, NOWHERE if name == "nowhere.test" else GOOD, name, ca, port=port)
    heard = b""
    try:
        if await caller.handshake():
            for each in said:
                await caller.send(each.encode())
            while data := await caller.receive():
                heard += data
    except OSError:  # it was cut
        pass
    finally:
        await caller.close()
    return heard


async def _over_http1(box: LocalBox, world: World, ca: Path) -> list[bytes]:
    """What goes well, and all that goes wrong; returns what the box was told."""
    basic = base64.b64encode(f"user:{MARK}".encode()).decode()
    keys = f"X-Key: {MARK}\r\nAuthorization: Basic {basic}\r\n"
    end = "Connection: close\r\n\r\n"
    heard = [await _say(box, ca, f"GET /{MARKER}?k={MARK} HTTP/1.1\r\nHost: good.test\r\n{keys}{end}")]
    assert b"200" in heard[0] and f"X-Key: {VALUE}".lower() in world.requests[-1].lower(), "the control"
    get = f"GET /?k={MARK} HTTP/1.1\r\n"
    refused = [
        f"{get}Host: other.test\r\n{keys}{end}",
        f"{get}Host: good.test:81\r\n{keys}{end}",
        f"{get}Host: good.test\r\nHost: good.test\r\n{keys}{end}",
        f"{get}Host: good.test\r\n{keys}Content-Length: 1\r\nTransfer-Encoding: chunked\r\n{end}",
        f"{get}Host: good.test\r\n{keys}No colon\r\n{end}",
        f"{get}{keys}{end}",
        f"G E T /?{MARK}\r\n\r\n",
    ]
    heard += [await _say(box, ca, each) for each in refused]
    assert all(b"hutch: " in page for page in heard[1:]), heard
    assert len(world.requests) == 1
    post = f"POST /?k={MARK} HTTP/1.1\r\nHost: good.test\r\n{keys}Transfer-Encoding: chunked\r\n\r\n"
    heard.append(await _say(box, ca, post, f"zz\r\n{MARK}"))
    request = f"{get}Host: nowhere.test\r\n{keys}{end}"
    heard.append(await _say(box, ca, request, name="nowhere.test"))
    assert b" 502 " in heard[-1] and b" 502 " in heard[-2], heard[-2:]
    world.speak("http/1.1")
    with _cutting(world):
        heard.append(await _say(box, ca, f"{get}Host: good.test:{CUT}\r\n{keys}{end}", port=CUT))
    world.speak("h2", "http/1.1")
    assert b"only this" in heard[-1]
    return heard


async def _over_http2(box: LocalBox, world: World, ca: Path) -> list[bytes]:
    """The same."""
    heard = []
    for host, expected in (("good.test", "200"), ("other.test", "403"), ("good.test:81", "403")):
        async with connected(box, ca) as client:
            status, page = await client.answer(await client.ask(("x-key", MARK), host=host, path=f"/{MARKER}?k={MARK}"))
            heard.append(page)
            assert status == expected
    assert f"x-key: {VALUE}\n" in world.requests[-1], "the control"
    async with connected(box, ca) as client:
        await client.ask(("x-key", MARK))
        await client.say(b"\xff" * 100)
        while await client.receive():
            pass
    return heard


async def _lives(box: LocalBox, home: Path, folder: Path) -> None:
    """All that a box may go through but the use of its secret."""
    await box.stop(timeout=0)
    await box.snapshots.create("early")
    await box.export(folder / "box.tar")
    clone = await box.clone("copy")
    await box.start()
    await clone.start()
    (gateway,) = gateways(home)
    os.kill(gateway, signal.SIGKILL)
    assert await poll_until(lambda: gateways(home) not in ([], [gateway]), 20)


async def _seen_by_the_tool(home: Path) -> list[bytes]:
    """What the tool tells about the boxes of a home."""
    hutch = [sys.executable, "-m", "hutch", "--home", str(home)]
    commands = (["list", "--all", "--json"], ["inspect", "holder"], ["inspect", "copy"], ["net", "log", "holder"])
    told = [await anyio.run_process([*hutch, *words], stderr=subprocess.STDOUT) for words in commands]
    return [done.stdout for done in told]


def _file_system(box_pid: int) -> list[Path]:
    """All of a running box's files, those in memory included."""
    root = f"/proc/{box_pid}/root"
    found = []
    for folder, names, files in os.walk(root):
        if folder == root:
            names[:] = [name for name in names if name not in ("proc", "sys")]
        found += [Path(folder, name) for name in files]
    return [path for path in found if path.is_file() and not path.is_symlink()]


async def test_the_value_is_nowhere(
    runtime: LocalRuntime,
    home: Path,
    logs: Path,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))
    caplog.set_level(logging.DEBUG, logger="hutch")
    assert VALUE not in repr(SECRET)
    box = await runtime.create(IMAGE, name="holder", secrets=[SECRET], env={"MARKER": MARKER})
    await box.start()
    await box.files.get("/etc/ssl/certs/ca-certificates.crt", tmp_path / "ca.pem")
    heard = await _over_http1(box, world, tmp_path / "ca.pem")
    heard += await _over_http2(box, world, tmp_path / "ca.pem")
    await box.files.write("/root/marker", base64.b64encode(b"x" + MARKER.encode()))
    await _lives(box, home, tmp_path)
    heard += await _over_http1_again(box, world, tmp_path / "ca.pem")
    heard += await _over_http1_again(await runtime.get("copy"), world, tmp_path / "ca.pem")
    shell = await box.exec("sh", "-c", "echo started; read end", stdin=True)
    assert await anext(aiter(shell.stdout)) == b"started\n"
    with (home / "gateway.log").open("a") as log:  # nothing of a box gets there, so it is put there
        log.write(f"{MARKER}\n")
    logging.getLogger("hutch").debug("%s", MARKER)

    info = await box.info()
    listed = await runtime.list()
    async with LocalRuntime(home) as local:
        pid = (await (await local.get("holder")).info()).pid
    assert pid is not None
    (gateway,) = gateways(home)
    assert (logs / f"{gateway}.log").stat().st_size
    tell = [sys.executable, "-c", "import logging, sys; logging.getLogger('hutch.net').debug(sys.argv[1])", MARKER]
    await anyio.run_process(tell, env={**os.environ, "LOUD": str(logs), "PYTHONPATH": str(logs)})
    own = [record.getMessage().encode() for record in caplog.records if record.name.startswith("hutch")]
    texts = {
        "what the box was told": heard,
        "what the library tells": [repr(each).encode() for each in (info, listed, await box.snapshots.list())],
        "what the tool tells": await _seen_by_the_tool(home),
        "the library's log": own,
    }
    for place, pieces in texts.items():
        assert shows(MARKER, pieces), f"the control: {place}"
        assert not shows(VALUE, pieces), place
    files = {
        "the home": searched(home),
        "the gateway's log": [home / "gateway.log"],
        "all logs": [path for path in logs.iterdir() if path.suffix == ".log"],
        "the archive": [tmp_path / "box.tar"],
        "the box": _file_system(pid),
    }
    for place, paths in files.items():
        assert holders(MARKER, *paths), f"the control: {place}"
        assert holders(VALUE, *paths) == [], place
    looked_into = processes()
    assert {pid, *gateways(home), *gateways(home, "hutch.host.keeper")} <= set(looked_into)
    assert holders(MARKER, processes=looked_into), "the control"
    assert holders(VALUE, processes=looked_into) == []
    assert ((home / "secrets.key").stat().st_mode & 0o777) == 0o600
    await shell.stdin.write(b"\n")
    await shell.wait()
    twin = await runtime.import_box(tmp_path / "box.tar", name="twin")
    info = await twin.info()
    assert not info.secrets and info.network.outbound == "disabled", "an archive has no secrets"


async def _over_http1_again(box: LocalBox, world: World, ca: Path) -> list[bytes]:
    """With another gateway, and another life of the box."""
    before = len(world.requests)
    with anyio.fail_after(20):
        while not (page := await get_tls(box, GOOD, "good.test", ca, more=f"X-Key: {MARK}\r\n")):
            await anyio.sleep(0.05)
    assert len(world.requests) == before + 1 and VALUE in world.requests[-1], "the control"
    return [page.encode()]


def test_the_search_knows_all_forms() -> None:
    for marker in (MARKER, VALUE):
        for before in ("", "a", "ab", "abc"):
            text = base64.b64encode(f"{before}{marker}after".encode())
            assert shows(marker, [text]), before
            assert shows(marker, [base64.urlsafe_b64encode(f"{before}{marker}".encode())])
        assert all(len(form) > 15 for form in forms(marker))
        assert not shows(marker, [b"", b"another", marker[1:].encode()])
