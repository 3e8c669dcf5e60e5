"""Package managers in a box that may reach the hosts of their repositories and nothing else. Which those are, the
machine's own configuration says."""

from __future__ import annotations

import ensurepip
import ipaddress
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

import pytest

from hutch.core.policy import Policy
from hutch.image import ImageStore
from hutch.runtime.runtime import LocalRuntime
from hutch.types import Outbound
from tests import debian

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.anyio, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

STORE = debian.CACHE.parent / "python-store"
IMAGE = "python:test"
PACKAGE = "six"


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[LocalRuntime]:
    """A runtime whose image store has a Debian with Python, made once for all runs."""
    if shutil.which("mmdebstrap") is None:
        pytest.skip("needs mmdebstrap")
    store = ImageStore(STORE)
    if not any(IMAGE in info.references for info in store.list()):
        await store.bootstrap(reference=IMAGE, packages=["python3", "ca-certificates"])
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(STORE)
    async with LocalRuntime(home) as runtime:
        yield runtime
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)


def _configured(name: str, otherwise: str) -> str:
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", f"global.{name}"], capture_output=True, text=True, timeout=60
    )
    return os.environ.get(f"PIP_{name.upper().replace('-', '_')}") or asked.stdout.strip() or otherwise


def _default_index() -> str:
    code = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.strip()


def _files(index: str, bundle: Path) -> set[str]:
    """Where the files of the package are."""
    page = urllib.request.Request(f"{index}/{PACKAGE}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(page, context=ssl.create_default_context(cafile=bundle), timeout=60) as answer:
        return {urljoin(page.full_url, entry["url"]) for entry in json.load(answer)["files"]}


def _rules(urls: set[str]) -> list[str]:
    """The hosts of the URLs; and their addresses, where those are private: a name alone may not lead there."""
    rules = set()
    for url in urls:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        assert parts.hostname is not None
        rules.add(f"{parts.hostname}:{port}")
        for *_, address in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM):
            found = ipaddress.ip_address(address[0])
            if not Policy(Outbound.ALLOW_LIST, [parts.hostname]).answer(parts.hostname, found, port):
                rules.add(f"[{found}]:{port}" if found.version == 6 else f"{found}:{port}")
    return sorted(rules)


async def test_pip_installs_from_the_machines_index(runtime: LocalRuntime) -> None:
    index = _configured("index-url", _default_index()).rstrip("/")
    bundle = Path(_configured("cert", ssl.get_default_verify_paths().cafile or ""))
    files = _files(index, bundle)
    rules = _rules({index, *files})
    (wheel,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    box = await runtime.create(IMAGE, network=rules)
    await box.files.put(wheel, "/tmp/pip.whl")
    await box.files.put(bundle, "/tmp/ca.pem")
    install = [
        *("python3", "/tmp/pip.whl/pip", "install", "--no-cache-dir", "--disable-pip-version-check", "--no-deps"),
        *("--index-url", index, "--cert", "/tmp/ca.pem", "--target", "/tmp/site"),
    ]
    done = await box.run(*install, PACKAGE, timeout=200)
    assert done.ok, (done.text, done.stderr.decode())
    check = await box.run("python3", "-c", f"import {PACKAGE}", env={"PYTHONPATH": "/tmp/site"})
    assert check.ok
    # The control: without the rules the same fails, and the log says why.
    await box.network.update(allow=["nobody.invalid"])
    again = await box.run(*install, "--retries", "0", "--upgrade", PACKAGE, timeout=200)
    assert not again.ok
    assert {refusal.reason for refusal in await box.network.log()} == {"the policy has no rule for the name"}


async def test_apt_updates_and_installs_from_the_machines_mirror(runtime: LocalRuntime) -> None:
    box = await runtime.create(IMAGE)
    found = await box.run("sh", "-c", "grep -rhoE 'https?://[^/ ]+' /etc/apt/sources.list /etc/apt/sources.list.d")
    await box.network.update(allow=_rules(set(found.text.split())))
    for command in ("apt-get -q update", "apt-get -q -y install --no-install-recommends hello", "hello"):
        done = await box.run(*command.split(), timeout=200)
        assert done.ok, (command, done.text, done.stderr.decode())
    assert "Hello" in done.text
    await box.network.update(allow=["nobody.invalid"])
    update = "rm -rf /var/lib/apt/lists/*; apt-get -q -o Acquire::Retries=0 update 2>&1"
    assert "Temporary failure resolving" in (await box.run("sh", "-c", update, timeout=200)).text
