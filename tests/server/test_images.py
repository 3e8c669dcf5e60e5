"""Images over HTTP: aliases and their history, logins at registries."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx2
import pytest

from tests.registry import Image, docker_registry, entry, tar
from tests.server.conftest import IMAGE, KEY, Served, make_home
from tests.server.test_http import check_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

USER, PASSWORD = "ann", "secret-word"
HTPASSWD = "ann:$2y$05$abcdefghijklmnopqrstuuUOabO4v2PoT/v47Y.znQK.9MsMDnesq\n"
NAME = quote("docker.io/library/busybox", safe="")


def image(content: bytes) -> Image:
    """An image of one file."""
    return Image([tar(entry("f", content))], {"Cmd": ["/f"]})


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Served]:
    """A server whose images are its own."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    server = Served(home, "--api-key", KEY, env={"HUTCH_DEBUG": "1"})
    yield server
    assert server.stop() == 0
    assert PASSWORD not in server.errors


@pytest.fixture
def client(own: Served) -> Iterator[httpx2.Client]:
    """A client of that server."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=own.url, headers=headers, timeout=30) as client:
        yield client


def pull(client: httpx2.Client, reference: str) -> dict[str, Any]:
    """Let the server fetch an image."""
    answer = client.post("/v1/x/images/pull", json={"reference": reference, "always": True})
    assert answer.status_code == 200, answer.text
    info: dict[str, Any] = answer.json()
    return info


def test_an_alias_is_given_taken_and_remembered(own: Served, client: httpx2.Client, tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir()
    with docker_registry(tmp_path / "registry") as registry:
        registry.push("team/tool", "v1", image(b"one"))
        registry.push("team/tool", "v2", image(b"two"))
        one, two = (pull(client, f"{registry.host}/team/tool:{tag}") for tag in ("v1", "v2"))
    path = f"/v1/images/{quote(f'{registry.host}/team/tool', safe='')}"
    begin = time.time()
    made = client.post(f"{path}/aliases", json={"alias": "stable", "digest": one["digest"]})
    assert made.status_code == 201, made.text
    aliases = {version["digest"]: set(version["aliases"]) for version in made.json()["versions"]}
    assert aliases == {one["digest"]: {"v1", "stable"}, two["digest"]: {"v2"}}
    # Told twice, it is the same; the digest of the manifest means the image as well.
    for digest in (one["digest"], one["manifest_digest"]):
        assert client.post(f"{path}/aliases", json={"alias": "stable", "digest": digest}).status_code == 201
    moved = client.post(f"{path}/aliases", json={"alias": "stable", "digest": two["digest"]}).json()
    assert [(change["from_digest"], change["to_digest"]) for change in moved["history"]] == [
        (one["digest"], two["digest"]),
        (None, one["digest"]),
    ]
    assert {change["actor"] for change in moved["history"]} == {"key:all"}
    assert all(change["alias"] == "stable" and change["recorded_at"].endswith("Z") for change in moved["history"])
    assert client.get(f"/v1/x/image?reference={registry.host}/team/tool:stable").json()["digest"] == two["digest"]
    # The history outlives the server, and the alias can be taken away.
    own.stop()
    own.start(own.port)
    assert client.get(path).json()["history"] == moved["history"]
    assert client.delete(f"{path}/aliases/stable").status_code == 204
    check_error(client.delete(f"{path}/aliases/stable"), 404, "not_found", "stable")
    assert sorted(client.get(path).json()["aliases"]) == ["v1", "v2"]
    assert time.time() - begin < 30


def test_what_is_no_alias(client: httpx2.Client, http: httpx2.Client) -> None:
    digest = http.get(f"/v1/images/{NAME}").json()["versions"][0]["digest"]
    absent = "sha256:" + 64 * "0"
    path = f"/v1/images/{NAME}/aliases"
    check_error(http.post(path, json={"alias": "x", "digest": absent}), 404, "not_found", absent)
    check_error(http.post(path, json={"alias": "a/b", "digest": digest}), 400, "invalid_argument", "alias")
    check_error(http.post(path, json={"alias": "x", "digest": "sha256:1"}), 400, "invalid_argument", "digest")
    check_error(http.post(path, json={"alias": "x"}), 400, "invalid_argument", "digest")
    check_error(
        http.post("/v1/images/absent/aliases", json={"alias": "x", "digest": digest}), 404, "not_found", "absent"
    )


def test_a_login_is_used_and_never_told(own: Served, client: httpx2.Client, tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    with docker_registry(folder) as filled:
        filled.push("team/private", "v1", image(b"private"))
    with docker_registry(folder, users=HTPASSWD) as registry:
        reference = f"{registry.host}/team/private:v1"
        create = {"image": reference}
        check_error(client.post("/v1/boxes", json=create), 422, "image_pull_failed", "wants a login")
        body = {"registry_host": registry.host, "username": USER, "password": "wrong"}
        general = client.post("/v1/images/registries", json=body).json()
        body = {**body, "repository_prefix": "team", "password": PASSWORD}
        made = client.post("/v1/images/registries", json=body)
        assert made.status_code == 201 and "password" not in made.text and PASSWORD not in made.text
        check_error(client.post("/v1/images/registries", json=body), 409, "already_exists", registry.host)
        view = made.json()
        assert (view["registry_host"], view["repository_prefix"], view["username"]) == (registry.host, "team", USER)
        listed = client.get("/v1/images/registries")
        assert listed.json()["registries"] == [general, view] and PASSWORD not in listed.text
        assert PASSWORD not in client.get("/v1/x/logins").text
        assert client.post("/v1/boxes", json=create).status_code == 201  # by the longest prefix
        client.delete(f"/v1/images/{quote(reference, safe='')}")
        assert client.delete(f"/v1/images/registries/{view['id']}").status_code == 204
        check_error(client.delete(f"/v1/images/registries/{view['id']}"), 404, "not_found", view["id"])
        answer = client.post("/v1/x/images/pull", json={"reference": reference, "always": True})
        check_error(answer, 422, "image_pull_failed", "unauthenticated")
    kept = own.home / "registries.json"
    assert kept.stat().st_mode & 0o777 == 0o600 and PASSWORD not in kept.read_text()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("registry_host", "https://h.example"),
        ("registry_host", "h.example/team"),
        ("registry_host", "plain"),
        ("repository_prefix", "Team"),
        ("repository_prefix", "../up"),
        ("username", "a:b"),
        ("username", ""),
        ("password", ""),
        ("password", "a\nb"),
        ("kind", "x"),
    ],
)
def test_what_is_no_login(http: httpx2.Client, field: str, value: str) -> None:
    body = {"registry_host": "h.example", "username": "ann", "password": PASSWORD, field: value}
    answer = http.post("/v1/images/registries", json=body)
    check_error(answer, 400, "invalid_argument")
    assert PASSWORD not in answer.text
    assert http.get("/v1/images/registries").json()["registries"] == []


def test_what_is_stored_where(tmp_path: Path, images: Path) -> None:
    home = make_home(tmp_path, images)
    database = tmp_path / "elsewhere.db"
    server = Served(home, "--database", str(database))
    with httpx2.Client(base_url=server.url) as http:
        box = http.post("/v1/boxes", json={"image": IMAGE}).json()["box_id"]
        assert http.delete(f"/v1/boxes/{box}").status_code == 204
    assert server.stop() == 0
    assert database.stat().st_mode & 0o777 == 0o600 and not (home / "server/server.db").exists()
