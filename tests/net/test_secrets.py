"""Secrets: used by a box, and nowhere to be found."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest

from hutch.errors import InvalidArgumentError
from hutch.types import Secret
from tests.net.conftest import IMAGE, call_tls, get, get_tls
from tests.net.world import GOOD, OTHER

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox
    from hutch.runtime.runtime import LocalRuntime
    from tests.net.world import World

pytestmark = pytest.mark.anyio

VALUE = "tr3asure-9b1f6c"
SECRET = Secret(name="API_KEY", value=VALUE, hosts=("good.test",))


@pytest.fixture
async def box(runtime: LocalRuntime, world: World, monkeypatch: pytest.MonkeyPatch) -> LocalBox:
    """A box with a secret for good.test, without any other rule."""
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))  # what the gateway trusts
    box = await runtime.create(IMAGE, secrets=[SECRET], command=["sleep", "1000"])
    await box.start()
    return box


async def _authority(box: LocalBox, tmp_path: Path) -> Path:
    await box.files.get("/etc/ssl/certs/ca-certificates.crt", tmp_path / "box-ca.pem")
    return tmp_path / "box-ca.pem"


async def test_the_value_arrives_and_the_box_has_a_placeholder(box: LocalBox, world: World, tmp_path: Path) -> None:
    ca = await _authority(box, tmp_path)
    assert (await box.run("sh", "-c", "echo $API_KEY")).text == "<HUTCH_SECRET:API_KEY>\n"
    more = "X-Key: <HUTCH_SECRET:API_KEY>\r\nX-Other: <HUTCH_SECRET:OTHER>\r\n"
    assert await get_tls(box, OTHER, "good.test", ca, more=more, path="/?k=<HUTCH_SECRET:API_KEY>")
    (seen,) = world.requests
    assert f"X-Key: {VALUE}".lower() in seen.lower() and "<HUTCH_SECRET:OTHER>" in seen
    assert seen.startswith(f"GET /?k={VALUE} ")


async def test_bodies_are_not_touched(box: LocalBox, world: World, tmp_path: Path) -> None:
    body = "<HUTCH_SECRET:API_KEY>"
    ca = await _authority(box, tmp_path)
    assert await get_tls(box, GOOD, "good.test", ca, more=f"Content-Length: {len(body)}\r\n", body=body)
    (seen,) = world.requests
    assert seen.endswith(body) and VALUE not in seen


async def test_other_hosts_get_the_placeholder(box: LocalBox, world: World, tmp_path: Path) -> None:
    """By TLS to another host, whose certificate is its own; by plain HTTP to the secret's host."""
    await box.network.update(allow=["other.test", "good.test"])
    more = "X-Key: <HUTCH_SECRET:API_KEY>\r\n"
    assert await get_tls(box, OTHER, "other.test", world.ca, more=more)
    await get(box, GOOD, "good.test", path="/?<HUTCH_SECRET:API_KEY>")
    assert len(world.requests) == 2
    assert all("<HUTCH_SECRET:API_KEY>" in seen and VALUE not in seen for seen in world.requests)


async def test_a_host_that_differs_from_the_server_name_is_refused(box: LocalBox, world: World, tmp_path: Path) -> None:
    ca = await _authority(box, tmp_path)
    assert "names another host" in await get_tls(box, GOOD, "good.test", ca, host="other.test")
    assert not world.requests


async def test_a_host_that_cannot_prove_itself_gets_nothing(
    runtime: LocalRuntime, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway trusts what the host trusts: here, nobody."""
    (tmp_path / "none.pem").touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    box = await runtime.create(IMAGE, secrets=[SECRET])
    await box.start()
    ca = await _authority(box, tmp_path)
    assert "TLS to it fails" in await get_tls(box, GOOD, "good.test", ca, more="X-Key: <HUTCH_SECRET:API_KEY>\r\n")
    assert not world.requests


async def _meet(box: LocalBox, ca: Path, said: bytes, protocols: tuple[str, ...] = ()) -> bytes:
    """Say something to the server of good.test that greets; returns all that came back before the end."""
    caller = await call_tls(box, GOOD, "good.test", ca, port=5555, protocols=protocols)
    heard = b""
    try:
        if not await caller.handshake():
            return b""
        await caller.send(said)
        while not heard.endswith(said) and (data := await caller.receive()):
            heard += data
    finally:
        await caller.close()
    return heard


async def _opaque(runtime: LocalRuntime, *secrets: Secret) -> LocalBox:
    box = await runtime.create(IMAGE, secrets=secrets)
    await box.start()
    return box


_OPAQUE = Secret(name="API_KEY", value=VALUE, hosts=("good.test:5555", "good.test"), pass_opaque=True)
_SAID = b"<HUTCH_SECRET:API_KEY>\n\n"


async def test_what_cannot_be_read_is_refused(
    runtime: LocalRuntime, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not trust the gateway, one that speaks no HTTP; however often they try, and although another
    secret for the host would let it pass."""
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))
    box = await _opaque(runtime, _OPAQUE, Secret(name="MORE", value="x", hosts=("good.test:5555",)))
    ca = await _authority(box, tmp_path)
    for _ in range(2):
        with pytest.raises(ssl.SSLCertVerificationError):
            await _meet(box, world.ca, _SAID)
        assert b"malformed HTTP" in await _meet(box, ca, _SAID)
        assert b"welcome" not in await _meet(box, ca, _SAID, ("imap",))
    assert not world.requests
    reasons = [refusal.reason for refusal in await box.network.log()]
    assert any("may not trust the gateway" in reason for reason in reasons)
    assert any("malformed HTTP" in reason for reason in reasons)


async def test_what_cannot_be_read_passes_untouched_by_option(
    runtime: LocalRuntime, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once where TLS says that it is no HTTP; otherwise from the second connection of such a client on. Others still
    use the secret."""
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))
    box = await _opaque(runtime, _OPAQUE)
    assert await _meet(box, world.ca, _SAID, ("imap",)) == b"welcome\n" + _SAID
    with pytest.raises(ssl.SSLCertVerificationError):
        await _meet(box, world.ca, _SAID)
    assert await _meet(box, world.ca, _SAID) == b"welcome\n" + _SAID
    assert world.requests == [_SAID.decode()] * 2
    ca = await _authority(box, tmp_path)
    assert await get_tls(box, GOOD, "good.test", ca, more="X-Key: <HUTCH_SECRET:API_KEY>\r\n")
    assert VALUE in world.requests[-1]


@pytest.mark.parametrize("network", ["enabled", [GOOD]])
async def test_secrets_beside_an_open_network(
    runtime: LocalRuntime, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str | list[str]
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(world.ca))
    box = await runtime.create(IMAGE, secrets=[SECRET], network=network)
    await box.start()
    ca = await _authority(box, tmp_path)
    assert await get_tls(box, GOOD, "good.test", ca, more="X-Key: <HUTCH_SECRET:API_KEY>\r\n")
    assert VALUE in world.requests[-1]
    assert await get_tls(box, GOOD, "other.test", world.ca, more="X-Key: <HUTCH_SECRET:API_KEY>\r\n")
    assert VALUE not in world.requests[-1]


@pytest.mark.parametrize(
    "secret",
    [
        Secret(name="A B", value="x", hosts=("a.com",)),
        Secret(name="A", value="", hosts=("a.com",)),
        Secret(name="A", value="x\r\nX-More: y", hosts=("a.com",)),
        Secret(name="A", value="x", hosts=()),
        Secret(name="A", value="x", hosts=("1.2.3.4",)),
        Secret(name="A", value="x", hosts=("a b",)),
    ],
)
async def test_senseless_secrets(runtime: LocalRuntime, secret: Secret) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await runtime.create(IMAGE, secrets=[secret])
    assert "X-More" not in str(caught.value)
