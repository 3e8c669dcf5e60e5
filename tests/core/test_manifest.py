"""Documents of hostile registries."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hutch.core.manifest import (
    MAX_DOCUMENT,
    Config,
    Descriptor,
    Index,
    Manifest,
    Platform,
    check_platform,
    image_info,
    make_config,
    parse_config,
    parse_index,
    parse_manifest,
    parse_platform,
    select,
    sha256,
    verify,
)
from hutch.errors import ImageError

SHA = "sha256:" + "ab" * 32
OCI = "application/vnd.oci.image"
DOCKER = "application/vnd.docker"
AMD64 = Platform("linux", "amd64")


def manifest(**changes: Any) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": {"mediaType": f"{OCI}.config.v1+json", "digest": SHA, "size": 10},
        "layers": [{"mediaType": f"{OCI}.layer.v1.tar+gzip", "digest": SHA, "size": 10}],
    }
    return json.dumps({**document, **changes}).encode()


def layer(media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": SHA, "size": 1, **more}


def config(**changes: Any) -> bytes:
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [SHA]}}
    return json.dumps({**document, **changes}).encode()


@pytest.mark.parametrize(
    "kind", [f"{OCI}.layer.v1.tar", f"{OCI}.layer.v1.tar+zstd", f"{DOCKER}.image.rootfs.diff.tar.gzip"]
)
def test_layer_types(kind: str) -> None:
    parsed = parse_manifest(manifest(layers=[layer(kind)]))
    assert isinstance(parsed, Manifest)
    assert parsed.layers == [Descriptor(SHA, 1, kind)]


def test_docker_types() -> None:
    data = manifest(
        mediaType=f"{DOCKER}.distribution.manifest.v2+json",
        config={"mediaType": f"{DOCKER}.container.image.v1+json", "digest": SHA, "size": 1},
    )
    assert isinstance(parse_manifest(data), Manifest)
    listed = {"schemaVersion": 2, "mediaType": f"{DOCKER}.distribution.manifest.list.v2+json", "manifests": []}
    assert isinstance(parse_manifest(json.dumps(listed).encode()), Index)


def test_the_transport_tells_where_the_document_does_not() -> None:
    bare = json.dumps({"schemaVersion": 2, "manifests": [layer("x")]}).encode()
    assert isinstance(parse_manifest(bare, f"{OCI}.index.v1+json"), Index)
    assert isinstance(parse_manifest(bare), Index)
    with pytest.raises(ImageError, match="cannot be understood"):
        parse_manifest(bare, f"{OCI}.manifest.v1+json")


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "cannot be understood"),
        (b"[]", "cannot be understood"),
        (b"\xff\xfe", "cannot be understood"),
        (b'{"config": ' + b'{"a":' * 100_000, "cannot be understood"),
        (b'{"schemaVersion": 1, "fsLayers": []}', "schema 1"),
        (manifest(layers=None), "cannot be understood"),
        (manifest(layers=[{"digest": SHA}]), "cannot be understood"),
        (manifest(layers=[layer("x", size="1")]), "cannot be understood"),
        (manifest(layers=[layer("x", size=2**70)]), "cannot be understood|unsupported media type"),
        (manifest(layers=[layer(f"{OCI}.layer.v1.tar", size=-1)]), "negative"),
        (manifest(layers=[layer(f"{OCI}.layer.v1.tar") | {"digest": "sha256:../../etc"}]), "malformed"),
        (manifest(layers=[layer(f"{OCI}.layer.v1.tar")] * 128), "128 layers; at most 127"),
        (manifest(layers=[layer(f"{DOCKER}.image.rootfs.foreign.diff.tar.gzip")]), "foreign"),
        (manifest(layers=[layer(f"{OCI}.layer.nondistributable.v1.tar")]), "foreign"),
        (manifest(layers=[layer(f"{OCI}.layer.v1.tar", urls=["http://169.254.169.254/"])]), "foreign"),
        (manifest(layers=[layer(f"{OCI}.layer.v1.tar+encrypted")]), "unsupported media type"),
        (manifest(config=layer("application/vnd.cncf.helm.config.v1+json")), "artifact"),
        (manifest(config=layer(f"{OCI}.config.v1+json", size=MAX_DOCUMENT + 1)), "at most"),
        (manifest(manifests=[]), "ambiguous"),
        (manifest() + b" " * MAX_DOCUMENT, "at most"),
    ],
)
def test_refused_manifests(data: bytes, cause: str) -> None:
    with pytest.raises(ImageError, match=cause):
        parse_manifest(data)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (config(rootfs={"diff_ids": []}), "names 0 layers and the manifest 1"),
        (config(rootfs={"diff_ids": ["../x"]}), "malformed diff id"),
        (config(rootfs={"diff_ids": [1]}), "cannot be understood"),
        (config(config={"Env": "A=b"}), "cannot be understood"),
        (config(config={"Labels": {"a": {}}}), "cannot be understood"),
        (b"{}", "cannot be understood"),
    ],
)
def test_refused_configs(data: bytes, cause: str) -> None:
    with pytest.raises(ImageError, match=cause):
        parse_config(data, 1)


def test_config_becomes_info() -> None:
    said = {
        "Entrypoint": ["/e"],
        "Cmd": ["c", "d"],
        "Env": ["A=b"],
        "WorkingDir": "/w",
        "User": "1:2",
        "Labels": {"k": "v"},
        "StopSignal": "SIGINT",
        "Volumes": {"/x": {}},
    }
    parsed = parse_config(config(config=said, created="2024-05-06T07:08:09.123456789Z"), 1)
    info = image_info(parsed, digest=SHA, manifest_digest="", size=3, wanted=AMD64, now=0.0)
    assert (info.entrypoint, info.cmd, info.env) == (("/e",), ("c", "d"), ("A=b",))
    assert (info.workdir, info.user, info.labels, info.stop_signal) == ("/w", "1:2", {"k": "v"}, "SIGINT")
    assert info.created_at == pytest.approx(1714979289.123456)


@pytest.mark.parametrize("created", [None, "", "yesterday", "0001-01-01T00:00:00Z", "9999-99-99"])
def test_nulls_and_odd_times(created: str | None) -> None:
    parsed = parse_config(config(config={"Cmd": None, "Env": None, "Labels": None, "User": None}, created=created), 1)
    info = image_info(parsed, digest=SHA, manifest_digest="", size=3, wanted=AMD64, now=5.0)
    assert (info.cmd, info.env, info.labels) == ((), (), {})
    assert info.created_at == 5.0 or created == "0001-01-01T00:00:00Z"


def test_made_config_is_read_back() -> None:
    data = make_config(SHA, AMD64, cmd=["/bin/sh"], env=["A=b"])
    assert data == make_config(SHA, AMD64, cmd=["/bin/sh"], env=["A=b"])
    info = image_info(parse_config(data, 1), digest=SHA, manifest_digest="", size=1, wanted=AMD64, now=1.0)
    assert (info.cmd, info.env, info.layers, info.architecture) == (("/bin/sh",), ("A=b",), (SHA,), "amd64")


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/amd64", AMD64),
        ("linux/x86_64", AMD64),
        ("amd64", AMD64),
        ("linux/arm64/v8", Platform("linux", "arm64", "v8")),
        ("linux/aarch64", Platform("linux", "arm64")),
        ("linux/armv6l", Platform("linux", "arm", "v6")),
        ("linux/armv7l", Platform("linux", "arm")),
        ("Linux/ARM/v7", Platform("linux", "arm", "v7")),
    ],
)
def test_platforms(text: str, platform: Platform) -> None:
    assert parse_platform(text) == platform


@pytest.mark.parametrize("text", ["", "linux/", "a/b/c/d", "linux/amd64;rm"])
def test_refused_platforms(text: str) -> None:
    with pytest.raises(ImageError, match="not a platform"):
        parse_platform(text)


def entries(*names: str) -> list[Descriptor]:
    found = []
    for number, name in enumerate(names):
        system, architecture, variant = (*name.split("/"), "", "")[:3]
        found.append(Descriptor(SHA, number, platform=Platform(system, architecture, variant)))
    return found


@pytest.mark.parametrize(
    ("names", "wanted", "at"),
    [
        (["linux/arm64", "linux/amd64"], "linux/amd64", 1),
        (["unknown/unknown", "linux/amd64", "linux/amd64"], "linux/amd64", 1),
        (["windows/amd64", "linux/amd64"], "linux/amd64", 1),
        (["linux/arm64"], "linux/aarch64", 0),
        (["linux/arm64", "linux/arm64/v8"], "linux/arm64", 1),
        (["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], "linux/arm", 1),
        (["linux/arm/v5", "linux/arm/v6"], "linux/arm", 1),
        (["linux/arm/v5", "linux/arm/v6"], "linux/arm/v5", 0),
        (["linux/amd64/v3", "linux/amd64"], "linux/amd64", 1),
    ],
)
def test_selection(names: list[str], wanted: str, at: int) -> None:
    assert select(entries(*names), parse_platform(wanted)).size == at


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["linux/arm64", "linux/s390x"], "linux/amd64"),
        (["linux/arm/v6"], "linux/arm/v7"),
        (["linux/amd64/v3"], "linux/amd64"),
        ([], "linux/amd64"),
    ],
)
def test_no_selection_says_what_there_is(names: list[str], wanted: str) -> None:
    with pytest.raises(ImageError, match=f"no image for {wanted}") as caught:
        select(entries(*names, "unknown/unknown"), parse_platform(wanted))
    assert all(name in str(caught.value) for name in names)
    assert "unknown" not in str(caught.value)


def test_an_only_entry_needs_no_platform() -> None:
    only = Descriptor(SHA, 1)
    assert select([only], AMD64) == only
    with pytest.raises(ImageError):
        select([only, only], AMD64)


machines = st.sampled_from(["amd64", "arm64", "arm", "riscv64"])
variants = st.sampled_from(["", "v5", "v6", "v7", "v8"])
platforms = st.builds(Platform, st.sampled_from(["linux", "windows", "unknown"]), machines, variants)


@given(st.lists(platforms, max_size=8), platforms)
def test_what_is_selected_fits(there: list[Platform], wanted: Platform) -> None:
    listed = [Descriptor(SHA, number, platform=platform) for number, platform in enumerate(there)]
    try:
        found = select(listed, wanted).platform
    except ImageError:
        assert wanted not in there
        return
    assert found is not None
    assert (found.os, found.architecture) == (wanted.os, wanted.architecture)
    assert not wanted.variant or found.variant == wanted.variant


def test_other_platforms_are_refused() -> None:
    check_platform(parse_config(config(), 1), AMD64)
    check_platform(parse_config(config(architecture="", os=""), 1), AMD64)
    with pytest.raises(ImageError, match="is for linux/arm64, not for linux/amd64"):
        check_platform(parse_config(config(architecture="arm64"), 1), AMD64)


def test_verification() -> None:
    verify(b"x", sha256(b"x"), "it")
    with pytest.raises(ImageError, match="it: the content has the digest"):
        verify(b"y", sha256(b"x"), "it")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["schemaVersion", "mediaType", "config", "layers", "manifests", "rootfs", "annotations"])


@given(st.dictionaries(keys, json_values, max_size=6))
def test_anything_is_understood_or_refused(document: dict[str, Any]) -> None:
    data = json.dumps(document).encode()
    for read, kinds in ((parse_manifest, (Index, Manifest)), (parse_index, Index)):
        with suppress(ImageError):
            assert isinstance(read(data), kinds)
    with suppress(ImageError):
        assert isinstance(parse_config(data, 1), Config)
