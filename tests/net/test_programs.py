"""Programs as people have them, at the host of a secret: they use it, and never have it."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.types import Secret
from tests.net import programs
from tests.net.world import GOOD

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from hutch.types import Mount, Result
    from tests.net.world import World

pytestmark = [pytest.mark.anyio, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

VALUE = "tr3asure-9b1f6c"
SHELF = 8443
_OWN = "/usr/local/share/ca-certificates/hutch.crt"
_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"

_PYTHON = """
import os, urllib.parse, urllib.request, requests, httpx2
key = {"X-Key": os.environ["API_KEY"]}
url = "https://good.test/?k=" + urllib.parse.quote(os.environ["API_KEY"])
"""
_NODE = """
const key = process.env.API_KEY, url = "https://good.test/?k=" + encodeURIComponent(key), headers = {"X-Key": key};
const failed = error => { console.error(error.cause ?? error); process.exit(1); };
"""
_NODE_HTTP2 = """
const session = require("http2").connect("https://good.test").on("error", failed);
session.request({":path": url.slice("https://good.test".length), ...headers}).on("end", () => session.close())
  .pipe(process.stdout);
"""
_CURL = 'curl -sS -H "X-Key: $API_KEY" -G --data-urlencode "k=$API_KEY" https://good.test/'


def _node(code: str) -> tuple[str, ...]:
    """As it is elsewhere than in Debian, where it trusts whom the system trusts."""
    return ("node", "--use-bundled-ca", "-e", _NODE + code)


def _python(code: str) -> tuple[str, ...]:
    return ("python3", "-c", _PYTHON + code)


# The command, and the version of HTTP in which the server is asked.
PROGRAMS = {
    "curl, HTTP/1.1": (("sh", "-c", f"{_CURL} --http1.1"), 1),
    "curl, HTTP/2": (("sh", "-c", _CURL), 2),
    "Node, https": (_node("require('https').get(url, {headers}, r => r.pipe(process.stdout)).on('error', failed)"), 1),
    "Node, fetch": (_node("fetch(url, {headers}).then(r => r.text()).then(console.log, failed)"), 1),
    "Node, http2": (_node(_NODE_HTTP2), 2),
    "urllib": (_python("print(urllib.request.urlopen(urllib.request.Request(url, headers=key)).read().decode())"), 1),
    "requests": (_python("print(requests.get(url, headers=key).text)"), 1),
    "httpx2, HTTP/1.1": (_python("print(httpx2.get(url, headers=key).text)"), 1),
    "httpx2, HTTP/2": (_python("print(httpx2.Client(http2=True).get(url, headers=key).text)"), 2),
}
_INDEX = f"https://user:%3CHUTCH_SECRET%3AAPI_KEY%3E@good.test:{SHELF}"
_INSTALL = "python3 /opt/site/pip.whl/pip install --no-cache-dir --disable-pip-version-check --retries 0"
MANAGERS = {
    "pip": f"{_INSTALL} --index-url {_INDEX}/simple/ --target /tmp/tiny tiny && PYTHONPATH=/tmp/tiny python3 -m tiny",
    "git": f"GIT_TERMINAL_PROMPT=0 git ls-remote {_INDEX}/tiny.git | grep refs/heads/main",
}


@pytest.fixture(scope="session")
def image_store() -> Path:
    """An image store that has the programs."""
    return anyio.run(programs.store)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Mount:
    """The Python packages."""
    return programs.site(tmp_path_factory.mktemp("site"))


@pytest.fixture
async def box(runtime: LocalRuntime, world: World, site: Mount, monkeypatch: pytest.MonkeyPatch) -> LocalBox:
    """A box with a secret for good.test."""
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))  # what the gateway trusts
    secret = Secret(name="API_KEY", value=VALUE, hosts=("good.test", f"good.test:{SHELF}"))
    box = await runtime.create(programs.IMAGE, secrets=[secret], mounts=[site], env={"PYTHONPATH": programs.SITE})
    await box.start()
    return box


async def _distrust(box: LocalBox, world: World) -> None:
    """Let the box trust the host's own authority, and nobody else."""
    for path in (_BUNDLE, _OWN):
        await box.files.write(path, world.ca.read_bytes())


def _told(done: Result) -> str:
    return done.text + done.stderr.decode()


def _refuses(done: Result) -> bool:
    return not done.ok and "certificate" in _told(done).lower()


@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_program_uses_the_value_and_never_has_it(box: LocalBox, world: World, program: str) -> None:
    """The control: without the box's authority it refuses to speak to the gateway."""
    command, version = PROGRAMS[program]
    done = await box.run(*command, timeout=30)
    assert done.ok and f"{GOOD} good.test" in done.text, _told(done)
    assert VALUE not in _told(done)
    (seen,) = world.requests
    assert f"x-key: {VALUE}" in seen.lower() and f"/?k={VALUE}" in seen
    assert seen.startswith(":" if version == 2 else "GET ")
    await _distrust(box, world)
    assert _refuses(done := await box.run(*command, timeout=30)), _told(done)
    assert world.requests == [seen]


@contextlib.contextmanager
def _shelf(world: World) -> Iterator[programs.Shelf]:
    shelf = programs.Shelf(VALUE)
    world.speak("http/1.1")
    listener = world.serve(GOOD, SHELF, lambda connection: world.under_tls(connection, shelf.handle))
    try:
        yield shelf
    finally:
        world.speak("h2", "http/1.1")
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize("manager", MANAGERS)
async def test_a_password_in_a_url(box: LocalBox, world: World, manager: str) -> None:
    command = ("sh", "-c", MANAGERS[manager])
    with _shelf(world) as shelf:
        done = await box.run(*command, timeout=60)
        assert done.ok, _told(done)
        served = list(shelf.served)
        assert served and VALUE not in _told(done)
        await _distrust(box, world)
        await box.run("rm", "-rf", "/tmp/tiny")
        assert _refuses(done := await box.run(*command, timeout=60)), _told(done)
        assert shelf.served == served
