"""Registries that lie, stall, break and mislead."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import msgspec
import pytest

from hutch.errors import ImageError
from hutch.image import Credential, ImageStore, RegistryConfig
from hutch.image.auth import Login
from hutch.image.registry import _Host
from tests.registry import OCI_MANIFEST, Exchange, HostileRegistry, Image, digest, hostile_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.root]


async def refused(store: ImageStore, hostile: HostileRegistry, cause: str) -> None:
    """The pull fails with the cause named. What stays is at most a layer that was right, which `prune` removes."""
    with anyio.fail_after(15), pytest.raises(ImageError, match=cause):
        await store.pull(f"{hostile.host}/app:v1")
    assert store.list() == []
    root = store._disk.root
    assert list((root / "tmp").iterdir()) == []
    await store.prune()
    assert list((root / "layers").iterdir()) == []


def changed_manifest(image: Image, change: Callable[[dict[str, Any]], object]) -> Callable[[Exchange], None]:
    document = json.loads(image.manifest)
    change(document)
    return lambda exchange: exchange.reply(200, json.dumps(document).encode(), Content_Type=OCI_MANIFEST)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda m: m["layers"][0].update(size=m["layers"][0]["size"] + 1), "has .* bytes, the manifest says"),
        (lambda m: m["layers"][0].update(size=10), "has .* bytes, the manifest says 10"),
        (lambda m: m["layers"][0].update(digest="sha256:" + "0" * 64), "manifest unknown"),
        (lambda m: m["layers"].pop(), "names 2 layers and the manifest 1"),
        (lambda m: m["layers"].reverse(), "uncompressed content has the digest"),
        (lambda m: m["config"].update(size=1 << 30), "at most"),
    ],
    ids=["longer", "shorter", "absent", "fewer", "swapped", "giant-config"],
)
async def test_lying_manifests(
    hostile: HostileRegistry, store: ImageStore, small: Image, change: Callable[[Any], object], cause: str
) -> None:
    hostile.add("app", "v1", small)
    hostile.rules["/manifests/"] = changed_manifest(small, change)
    await refused(store, hostile, cause)


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (b"not json", "cannot be understood"),
        (b"[" * 100_000, "cannot be understood"),
        (b" " * (5 << 20), "longer than"),
        (b'{"schemaVersion": 2, "manifests": []}', "no image for"),
        (b"", "cannot be understood"),
    ],
)
async def test_bad_documents(hostile: HostileRegistry, store: ImageStore, body: bytes, cause: str) -> None:
    hostile.rules["/manifests/"] = lambda exchange: exchange.reply(200, body)
    await refused(store, hostile, cause)


async def test_an_index_of_itself(hostile: HostileRegistry, store: ImageStore) -> None:
    # By tag, so that no digest stops it: each level names a further one.
    inner: list[bytes] = [b"{}"]
    for _ in range(8):
        platform = {"os": "linux", "architecture": "amd64"}
        kind = "application/vnd.oci.image.index.v1+json"
        descriptor = Image.descriptor(inner[-1], kind, platform=platform)
        inner.append(json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": [descriptor]}).encode())
        hostile.content[f"/v2/app/manifests/{digest(inner[-1])}"] = (inner[-1], kind)
    hostile.content["/v2/app/manifests/v1"] = (inner[-1], "")
    with pytest.raises(ImageError, match="nested too deep"):
        await store.pull(f"{hostile.host}/app:v1", platform="linux/amd64")


async def test_other_bytes_with_the_same_content(hostile: HostileRegistry, store: ImageStore, small: Image) -> None:
    hostile.add("app", "v1", small)
    right = small.blobs[0]
    wrong = right[:4] + b"\x01" + right[5:]  # the time stamp in gzip's header
    hostile.rules[digest(right)] = lambda exchange: exchange.reply(200, wrong)
    await refused(store, hostile, "the content has the digest")


@pytest.mark.parametrize("part", ["manifest", "config", "blob"])
async def test_wrong_bytes(hostile: HostileRegistry, store: ImageStore, small: Image, part: str) -> None:
    hostile.add("app", "v1", small)
    right = {"manifest": small.manifest, "config": small.config_blob, "blob": small.blobs[0]}[part]
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    hostile.rules[digest(right)] = lambda exchange: exchange.reply(200, wrong)
    if part == "manifest":
        with pytest.raises(ImageError, match="manifest: the content has the digest"):
            await store.pull(f"{hostile.host}/app@{digest(right)}")
    else:
        await refused(store, hostile, "the content has the digest|layer .* is corrupt")


async def test_an_endless_answer(hostile: HostileRegistry, store: ImageStore, small: Image) -> None:
    hostile.add("app", "v1", small)

    def endless(exchange: Exchange) -> None:
        exchange.send_response(200)
        exchange.send_header("Transfer-Encoding", "chunked")
        exchange.end_headers()
        while True:
            exchange.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    hostile.rules[digest(small.blobs[0])] = endless
    await refused(store, hostile, "longer than the")
    hostile.rules["/manifests/"] = endless
    await refused(store, hostile, "longer than")


@pytest.mark.parametrize("part", ["/manifests/", "/blobs/"])
async def test_silence(hostile: HostileRegistry, tmp_path: Path, small: Image, part: str) -> None:
    hostile.add("app", "v1", small)
    done = threading.Event()
    hostile.rules[part] = lambda exchange: exchange.cut() if done.wait(10) else None
    store = ImageStore(tmp_path / "s", config=RegistryConfig(docker_config=None, read_timeout=0.2, retries=1))
    try:
        await refused(store, hostile, "no answer in time")
    finally:
        done.set()


def cut_after(image: Image, *lengths: int) -> Callable[[Exchange], None]:
    """Break the connection after so many bytes, once for each length; then be honest."""
    left = list(lengths)

    def handler(exchange: Exchange) -> None:
        if not left:
            server = exchange.server
            assert isinstance(server, HostileRegistry)
            return server.honest(exchange)
        data = image.blobs[0]
        start = int(exchange.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        exchange.send_response(206 if start else 200)
        if start:
            exchange.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        exchange.send_header("Content-Length", str(len(data) - start))
        exchange.end_headers()
        exchange.wfile.write(data[start : start + left.pop(0)])
        exchange.cut()

    return handler


async def test_a_broken_connection_is_resumed(hostile: HostileRegistry, store: ImageStore, large: Image) -> None:
    hostile.add("app", "v1", large)
    name = digest(large.blobs[0])
    hostile.rules[name] = cut_after(large, 1_000_000, 0, 2_000_000)
    seen: list[int] = []
    info = await store.pull(
        f"{hostile.host}/app:v1", progress=lambda step: seen.append(step.done) if step.total is not None else None
    )
    assert info.layers == tuple(large.diff_ids)
    ranges = [headers.get("Range") for headers in hostile.asked(name)]
    assert ranges == [None, "bytes=1000000-", "bytes=1000000-", "bytes=3000000-"]
    assert seen == sorted(seen)
    assert seen[-1] == len(large.blobs[0])


async def test_servers_without_ranges(hostile: HostileRegistry, store: ImageStore, large: Image) -> None:
    hostile.add("app", "v1", large)
    cut = cut_after(large, 1_000_000)

    def handler(exchange: Exchange) -> None:
        if "Range" in exchange.headers:
            exchange.reply(200, large.blobs[0])
        else:
            cut(exchange)

    hostile.rules[digest(large.blobs[0])] = handler
    assert (await store.pull(f"{hostile.host}/app:v1")).layers == tuple(large.diff_ids)


@pytest.mark.parametrize("answer", ["bytes 0-9/10", "", "bytes 1000001-2/3"])
async def test_another_range_than_asked(hostile: HostileRegistry, store: ImageStore, large: Image, answer: str) -> None:
    hostile.add("app", "v1", large)
    cut = cut_after(large, 1_000_000)

    def handler(exchange: Exchange) -> None:
        if "Range" in exchange.headers:
            exchange.reply(206, large.blobs[0][1_000_000:], Content_Range=answer)
        else:
            cut(exchange)

    hostile.rules[digest(large.blobs[0])] = handler
    await refused(store, hostile, "not the range")


async def test_hope_ends(hostile: HostileRegistry, store: ImageStore, large: Image) -> None:
    hostile.add("app", "v1", large)
    name = digest(large.blobs[0])
    hostile.rules[name] = cut_after(large, *[10] * 50)
    await refused(store, hostile, f"registry {hostile.host}")
    assert len(hostile.asked(name)) == 3  # once, and two retries


async def test_passing_failures_pass(hostile: HostileRegistry, store: ImageStore, small: Image) -> None:
    hostile.add("app", "v1", small)
    busy = [503, 429]

    def handler(exchange: Exchange) -> None:
        if busy:
            exchange.reply(busy.pop(), Retry_After="0")
        else:
            hostile.honest(exchange)

    hostile.rules["/manifests/"] = handler
    assert (await store.pull(f"{hostile.host}/app:v1")).digest == digest(small.config_blob)


async def test_a_mirror_takes_over_in_the_middle(
    hostile: HostileRegistry, tmp_path: Path, large: Image, config: RegistryConfig
) -> None:
    hostile.add("app", "v1", large)
    name = digest(large.blobs[0])
    with hostile_registry() as mirror:
        mirror.add("app", "v1", large)
        mirror.rules[name] = cut_after(large, 1_500_000, *[0] * 9)
        mirrors = {hostile.host: [mirror.host]}
        store = ImageStore(tmp_path / "s", config=msgspec.structs.replace(config, mirrors=mirrors))
        info = await store.pull(f"{hostile.host}/app:v1")
    assert info.layers == tuple(large.diff_ids)
    assert [headers.get("Range") for headers in hostile.asked(name)] == ["bytes=1500000-"]
    assert hostile.asked("/manifests/") == []


@pytest.mark.parametrize("broken", ["manifest", "config", "absent"])
async def test_a_lying_mirror_is_left(
    hostile: HostileRegistry, tmp_path: Path, small: Image, config: RegistryConfig, broken: str
) -> None:
    hostile.add("app", "v1", small)
    with hostile_registry() as mirror:
        if broken != "absent":
            mirror.add("app", "v1", small)
            lie = digest(small.manifest if broken == "manifest" else small.config_blob)
            mirror.rules[lie] = lambda exchange: exchange.reply(200, b"{}")
        store = ImageStore(
            tmp_path / "s", config=msgspec.structs.replace(config, mirrors={hostile.host: [mirror.host]})
        )
        info = await store.pull(f"{hostile.host}/app@{digest(small.manifest)}")
    assert info.digest == digest(small.config_blob)


async def test_redirects(hostile: HostileRegistry, store: ImageStore, small: Image) -> None:
    hostile.add("app", "v1", small)
    name = digest(small.blobs[0])
    with hostile_registry() as other:
        other.content["/elsewhere"] = (small.blobs[0], "")
        hostile.rules[name] = lambda exchange: exchange.reply(307, Location=f"http://{other.host}/elsewhere")
        await store.pull(f"{hostile.host}/app:v1")
        assert len(other.asked("/elsewhere")) == 1


@pytest.mark.parametrize(
    ("location", "cause"),
    [
        ("SELF", "more than 5 redirects"),
        ("file:///etc/passwd", "not allowed"),
        ("http://192.0.2.1/x", "not allowed"),
        ("gopher://127.0.0.1/x", "not allowed"),
        ("http://[bad", "malformed|not allowed"),
        ("", "more than 5 redirects"),
    ],
)
async def test_bad_redirects(
    hostile: HostileRegistry, store: ImageStore, small: Image, location: str, cause: str
) -> None:
    hostile.add("app", "v1", small)
    hostile.rules[digest(small.blobs[0])] = lambda exchange: exchange.reply(
        302, Location=exchange.path if location == "SELF" else location
    )
    await refused(store, hostile, cause)


async def test_server_text_is_cleaned(hostile: HostileRegistry, store: ImageStore) -> None:
    said = {"errors": [{"code": "X", "message": "bad \x1b[31m\n" + "y" * 5000}]}
    hostile.rules["/manifests/"] = lambda exchange: exchange.reply(404, json.dumps(said).encode())
    with pytest.raises(ImageError) as caught:
        await store.pull(f"{hostile.host}/app:v1")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 600


class TestTokens:
    """The token protocol, honest and not."""

    LOGIN = Credential("ann", "secret-word")

    def protect(self, hostile: HostileRegistry, realm: str = "", *, answer: bytes = b'{"token": "T1"}') -> list[str]:
        """Let the registry want a token; return the list of tokens that it will take."""
        realm = realm or f"http://{hostile.host}/token"
        good = ["Bearer T1"]

        def guarded(exchange: Exchange) -> None:
            if exchange.headers.get("Authorization") in good:
                return hostile.honest(exchange)
            challenge = f'Bearer realm="{realm}",service="the \\"service\\"",scope="repository:app:pull"'
            return exchange.reply(401, WWW_Authenticate=challenge)

        hostile.rules["/v2/app/"] = guarded
        hostile.rules["/token"] = lambda exchange: exchange.reply(200, answer)
        return good

    def store(self, folder: Path, config: RegistryConfig, hostile: HostileRegistry) -> ImageStore:
        return ImageStore(folder / "s", config=msgspec.structs.replace(config, credentials={hostile.host: self.LOGIN}))

    @pytest.mark.parametrize("answer", [b'{"token": "T1"}', b'{"access_token": "T1", "expires_in": 1}'])
    async def test_a_token_is_fetched_once(
        self, hostile: HostileRegistry, tmp_path: Path, small: Image, config: RegistryConfig, answer: bytes
    ) -> None:
        hostile.add("app", "v1", small)
        self.protect(hostile, answer=answer)
        await self.store(tmp_path, config, hostile).pull(f"{hostile.host}/app:v1")
        (headers,) = hostile.asked("/token?")
        assert headers["Authorization"] == self.LOGIN.basic
        (path,) = [path for path, _ in hostile.requests if path.startswith("/token")]
        assert "scope=repository%3Aapp%3Apull" in path
        assert "service=the+%22service%22" in path or "service=the%20%22service%22" in path

    async def test_anonymous_tokens(self, hostile: HostileRegistry, store: ImageStore, small: Image) -> None:
        hostile.add("app", "v1", small)
        self.protect(hostile)
        await store.pull(f"{hostile.host}/app:v1")
        assert "Authorization" not in hostile.asked("/token?")[0]

    async def test_a_token_that_dies_in_between(
        self, hostile: HostileRegistry, store: ImageStore, small: Image
    ) -> None:
        hostile.add("app", "v1", small)
        good = self.protect(hostile)
        honest = hostile.honest

        def dying(exchange: Exchange) -> None:
            honest(exchange)
            if "/manifests/" in exchange.path:
                good[:] = ["Bearer T2"]
                hostile.rules["/token"] = lambda asked: asked.reply(200, b'{"token": "T2"}')

        hostile.honest = dying  # type: ignore[method-assign]
        await store.pull(f"{hostile.host}/app:v1")
        assert len(hostile.asked("/token?")) == 2

    @pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"token": "a\\r\\nEvil: x"}', b'{"token": 5}'])
    async def test_bad_tokens(self, hostile: HostileRegistry, store: ImageStore, small: Image, answer: bytes) -> None:
        hostile.add("app", "v1", small)
        self.protect(hostile, answer=answer)
        await refused(store, hostile, "no token")

    @pytest.mark.parametrize("realm", ["http://192.0.2.1/token", "file:///etc/passwd", "", "http://[", "ftp://x/y"])
    async def test_realms_that_are_not_trusted(
        self, hostile: HostileRegistry, tmp_path: Path, small: Image, config: RegistryConfig, realm: str
    ) -> None:
        hostile.add("app", "v1", small)
        self.protect(hostile, realm=realm or "nonsense")
        await refused(self.store(tmp_path, config, hostile), hostile, "not trusted")

    async def test_a_login_that_never_ends(
        self, hostile: HostileRegistry, tmp_path: Path, small: Image, config: RegistryConfig
    ) -> None:
        hostile.add("app", "v1", small)
        self.protect(hostile)[:] = []
        await refused(self.store(tmp_path, config, hostile), hostile, "unauthenticated")
        assert len(hostile.asked("/token?")) == 1

    async def test_credentials_stay_with_their_host(
        self, hostile: HostileRegistry, tmp_path: Path, small: Image, config: RegistryConfig
    ) -> None:
        hostile.add("app", "v1", small)
        self.protect(hostile)
        with hostile_registry() as other:
            other.rules["/"] = lambda exchange: exchange.reply(401, WWW_Authenticate='Basic realm="give me"')
            name = digest(small.blobs[0])
            guarded = hostile.rules.pop("/v2/app/")

            def astray(exchange: Exchange) -> None:
                if exchange.headers.get("Authorization"):
                    exchange.reply(307, Location=f"http://{other.host}/take")
                else:
                    guarded(exchange)

            hostile.rules[name] = astray
            hostile.rules["/v2/app/"] = guarded
            await refused(self.store(tmp_path, config, hostile), hostile, "unauthenticated")
            assert len(other.asked("/take")) >= 1
            assert all("Authorization" not in headers for headers in other.asked("/"))

    async def test_kinds_of_login(self, hostile: HostileRegistry, store: ImageStore) -> None:
        for header, cause in (("Negotiate", "unsupported"), ("", "unsupported"), ("Basic x", "wants a login")):
            hostile.rules["/v2/app/"] = lambda exchange, header=header: exchange.reply(  # type: ignore[misc]
                401, WWW_Authenticate=header
            )
            await refused(store, hostile, cause)


async def test_plain_http_is_for_loopback(config: RegistryConfig) -> None:
    host = _Host("http://registry.example", "app", config)
    with pytest.raises(ImageError, match="plain http is allowed to loopback"):
        async with host.get("manifests/v1", accept="*/*"):
            pass


@pytest.mark.parametrize("secure", [True, False])
async def test_credentials_never_leave_in_the_open(secure: bool) -> None:
    async def fetch(url: httpx2.URL, headers: Mapping[str, str]) -> bytes:
        raise AssertionError("something was sent")

    origin = httpx2.URL("https://registry.example" if secure else "http://registry.example")
    login = Login(origin, "app", Credential("ann", "secret-word"), fetch)
    if secure:
        for realm in ("http://registry.example/t", "http://127.0.0.1/t", "https://127.0.0.1/t", "https://[::1]/t"):
            with pytest.raises(ImageError, match="not trusted"):
                await login.answer(f'Bearer realm="{realm}"')
        await login.answer("Basic realm=x")
        assert login.covers(httpx2.URL("https://registry.example/x"))
        assert not login.covers(httpx2.URL("https://registry.example:8443/x"))
        assert not login.covers(httpx2.URL("http://registry.example/x"))
    else:
        for challenge in ("Basic realm=x", 'Bearer realm="http://registry.example/t"'):
            with pytest.raises(ImageError, match=r"not sent to registry\.example in plain http"):
                await login.answer(challenge)
