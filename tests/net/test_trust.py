"""Whom the programs of a box trust: the box's own authority beside those of its image, however the image keeps them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from hutch.types import Secret
from tests import rootfs
from tests.net.conftest import get_tls
from tests.net.world import GOOD, OTHER

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from tests.net.world import World

pytestmark = pytest.mark.anyio

VALUE = "tr3asure-9b1f6c"
KEY = "X-Key: <HUTCH_SECRET:API_KEY>\r\n"
OWN = "/usr/local/share/ca-certificates/hutch.crt"
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"


def _debian(tree: Path, ca: bytes) -> None:
    (tree / "etc/ssl/certs").mkdir(parents=True)
    (tree / "etc/ssl/certs/ca-certificates.crt").write_bytes(ca)


def _alpine(tree: Path, ca: bytes) -> None:
    _debian(tree, ca)
    (tree / "etc/ssl/cert.pem").symlink_to("certs/ca-certificates.crt")
    (tree / "usr/local/share/ca-certificates").mkdir(parents=True)


def _fedora(tree: Path, ca: bytes) -> None:
    """Without the file where Debian has its bundle; the other's name leads to a third place."""
    (tree / "etc/pki/tls/certs").mkdir(parents=True)
    (tree / "etc/pki/extracted").mkdir()
    (tree / "etc/pki/extracted/bundle.pem").write_bytes(ca)
    (tree / "etc/pki/tls/certs/ca-bundle.crt").symlink_to("../../extracted/bundle.pem")
    (tree / "etc/ssl").mkdir()
    (tree / "etc/ssl/certs").symlink_to("../pki/tls/certs")


def _bare(tree: Path, ca: bytes) -> None:
    """No trust store at all."""


async def _box(runtime: LocalRuntime, tmp_path: Path, world: World, layout: Callable[[Path, bytes], None]) -> LocalBox:
    tree = rootfs.build(tmp_path / "tree")
    layout(tree, world.ca.read_bytes())
    await runtime.images.load(tree, reference=f"{layout.__name__[1:]}:trust")
    secret = Secret(name="API_KEY", value=VALUE, hosts=("good.test",))
    box = await runtime.create(f"{layout.__name__[1:]}:trust", secrets=[secret], network=["other.test"])
    await box.start()
    return box


@pytest.mark.parametrize("layout", [_debian, _alpine, _fedora, _bare])
async def test_images_keep_whom_they_trust(
    runtime: LocalRuntime,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: Callable[[Path, bytes], None],
) -> None:
    """The file that the box's variables name admits the gateway and whomever the image trusts, also after another
    start, which adds nothing; what is a link to that file stays one."""
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))  # what the gateway trusts
    box = await _box(runtime, tmp_path, world, layout)
    before = (await box.run("sh", "-c", "cat $SSL_CERT_FILE; readlink /etc/ssl/cert.pem")).text
    await box.stop(timeout=0)
    await box.start()
    assert (await box.run("sh", "-c", "cat $SSL_CERT_FILE; readlink /etc/ssl/cert.pem")).text == before
    assert before.count("BEGIN CERTIFICATE") == (1 if layout is _bare else 2)
    assert "certs/ca-certificates.crt" in before or layout is not _alpine
    (tmp_path / "trusted").write_bytes(await box.files.read(BUNDLE))
    assert await get_tls(box, GOOD, "good.test", tmp_path / "trusted", more=KEY)
    assert VALUE in world.requests[-1]
    if layout is not _bare:
        assert await get_tls(box, OTHER, "other.test", tmp_path / "trusted", more=KEY)
        assert VALUE not in world.requests[-1]


async def test_a_file_of_the_users_choice_stays_as_it_is(
    runtime: LocalRuntime, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on a folder of the host: the authority lies beside it, for who wants to add it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))
    secret = Secret(name="API_KEY", value=VALUE, hosts=("good.test",))
    box = await runtime.create("busybox:test", secrets=[secret], env={"SSL_CERT_FILE": "/etc/mine.pem"})
    await box.start()
    await box.files.write("/etc/mine.pem", b"mine\n")
    await box.stop(timeout=0)
    await box.start()
    assert (await box.run("sh", "-c", "echo $SSL_CERT_FILE; cat $SSL_CERT_FILE")).text == "/etc/mine.pem\nmine\n"
    own = await box.files.read(OWN)
    shown = subprocess.run(["openssl", "x509", "-noout", "-subject"], input=own, capture_output=True, check=True)
    assert b"Hutch gateway of box" in shown.stdout
