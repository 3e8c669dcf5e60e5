"""auth, profiles, and which boxes a command is about."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.conftest import KEY, Terminal, Tool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.remote.processes import Process

pytestmark = pytest.mark.root


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Tool]:
    """The tool on a home where nobody is logged in."""
    tool = Tool(tmp_path / "client" / "home")
    yield tool
    tool.close()


def stored(tool: Tool) -> Path:
    """The file of profiles."""
    return tool.home / "credentials.toml"


def test_login_and_everything_goes_there(client: Tool, server: Process) -> None:
    done = client("auth", "login", "--url", f"{server.url}/", input=f"{KEY}\n".encode())
    assert KEY.encode() not in done.stdout + done.stderr and server.url.encode() in done.stdout
    assert stored(client).stat().st_mode & 0o777 == 0o600 and client.home.stat().st_mode & 0o777 == 0o700
    box = client.text("create", "--name", "far", "busybox")
    assert client.text("exec", "far", "echo", "from afar") == "from afar"
    assert client.boxes() == [box]
    assert client.text("--local", "ls", "-q") == client.text("ls", "-q", "--local") == ""
    status = client.text("auth", "status")
    assert server.url in status and "profile default" in status and KEY not in status
    facts = client.json("auth", "whoami", "--json")
    assert (facts["url"], facts["sub"], facts["scopes"]) == (server.url, "key:all", ["read", "write"])
    client("rm", "-f", "far")
    assert "forgotten" in client.text("auth", "logout")
    assert not stored(client).exists()
    assert "not there" in client.text("auth", "logout")
    assert json.loads(client("auth", "status", "--json", code=1).stdout) == {"server": None, "profiles": []}
    assert b"auth login" in client("auth", "whoami", code=1).stderr


def test_a_key_that_the_server_does_not_take_is_not_stored(client: Tool, server: Process) -> None:
    for key in ("wrong-key-word", "", "two words"):
        done = client("auth", "login", "--url", server.url, input=f"{key}\n".encode(), code=1)
        assert done.stderr.startswith(b"Error: ")
        assert not key or key.encode() not in done.stderr
    assert not stored(client).exists()
    assert b"--url" in client("auth", "login", input=b"x\n", code=2).stderr


def test_option_before_environment_before_file(client: Tool, server: Process) -> None:
    client("auth", "login", "--url", server.url, "--profile", "work", input=f"{KEY}\n".encode())
    nowhere = "http://127.0.0.1:1"
    status = client.json("auth", "status", "--json", "--profile", "work")["server"]
    assert status == {"url": server.url, "path_prefix": "", "key": True, "source": "profile work"}

    def where(*words: str, code: int = 0, **env: str) -> Any:
        return json.loads(client("auth", "status", "--json", *words, input=b"", code=code, **env).stdout)["server"]

    assert where(code=1) is None
    assert where(HUTCH_PROFILE="work")["source"] == "profile work"
    assert where(HUTCH_URL=nowhere)["url"] == nowhere
    assert where("--profile", "work", HUTCH_URL=nowhere)["url"] == server.url
    assert where("--url", server.url, HUTCH_URL=nowhere, HUTCH_PROFILE="absent")["source"] == "--url"
    # A key goes where it was stored for, and elsewhere only on request.
    assert where("--url", f"{server.url}/")["key"] is True
    assert where("--url", nowhere)["key"] is False
    assert where("--url", nowhere, "--profile", "work")["key"] is True
    assert where("--url", nowhere, HUTCH_API_KEY="x")["key"] is True
    assert b"wrong" not in client("ls", code=1, HUTCH_PROFILE="work", HUTCH_API_KEY="wrong").stderr
    assert b"'absent'" in client("ls", "--profile", "absent", code=1).stderr
    assert b"--local" in client("ls", "--local", "--url", nowhere, code=2).stderr


@pytest.mark.parametrize(
    "text",
    [
        "profiles = 3",
        "[profiles.default]\napi_key = 'secret-word'",
        "[profiles.default]\nurl = 'http://h'\napi_keys = 'secret-word'",
        "[profiles.default\nurl = 'secret-word'",
        "\x00",
    ],
)
def test_a_file_that_is_not_understood_is_told_and_kept(client: Tool, server: Process, text: str) -> None:
    client.home.mkdir(parents=True, mode=0o700)
    stored(client).touch(mode=0o600)
    stored(client).write_text(text)
    for words in (["ls"], ["auth", "status"], ["auth", "logout"], ["auth", "login", "--url", server.url]):
        done = client(*words, input=f"{KEY}\n".encode(), code=1)
        assert b"credentials.toml" in done.stderr and b"secret-word" not in done.stderr
    assert stored(client).read_text() == text
    assert client.text("--local", "ls", "-q") == ""


def test_a_file_that_others_may_read_is_refused(client: Tool, server: Process) -> None:
    client("auth", "login", "--url", server.url, input=f"{KEY}\n".encode())
    stored(client).chmod(0o644)
    assert b"chmod 600" in client("ls", code=1).stderr


def test_profiles_are_kept_beside_each_other(client: Tool, server: Process) -> None:
    for name in ("one", "two"):
        client("auth", "login", "--url", server.url, "--profile", name, input=f"{KEY}\n".encode())
    client("auth", "logout", "--profile", "one")
    assert client.json("auth", "status", "--json", "--profile", "two")["profiles"] == ["two"]


def test_the_key_is_asked_for_and_not_shown(client: Tool, server: Process) -> None:
    terminal = Terminal(client, "auth", "login", "--url", server.url)
    try:
        terminal.expect(b"API key for ")
        terminal.expect(b": ")
        terminal.type(f"{KEY}\n".encode())
        assert terminal.wait() == 0
        assert KEY.encode() not in terminal.seen and terminal.restored
    finally:
        terminal.close()
    assert KEY in stored(client).read_text()


def test_commands_about_this_machine_cannot_be_asked_of_a_server(client: Tool, server: Process) -> None:
    for words in (["doctor"], ["serve"], ["completion", "bash"]):
        assert b"the machine that it runs on" in client("--url", server.url, *words, code=2).stderr
    assert "Boxes can run." in client.text("doctor", HUTCH_URL=server.url)


def test_what_a_server_cannot_have_is_told(client: Tool, server: Process, tmp_path: Path) -> None:
    client.env.update(HUTCH_URL=server.url, HUTCH_API_KEY=KEY)
    (tmp_path / "data").mkdir()
    words = ["run", "--rm", "-v", f"{tmp_path}/data:/mnt", "busybox", "true"]
    done = client(*words, code=1)
    assert b"cannot be mounted from afar" in done.stderr and str(tmp_path).encode() not in done.stderr
    assert b"make a tar" in client("image", "import", str(tmp_path / "data"), "x", code=1).stderr
    assert client.boxes() == []


def test_a_server_that_is_not_there(client: Tool) -> None:
    done = client("--url", "http://127.0.0.1:1", "ls", code=1)
    assert re.fullmatch(rb"Error: http://127.0.0.1:1 does not answer: .*\n", done.stderr)
    assert b"not the address of a server" in client("--url", "nonsense", "ls", code=1).stderr
    assert not client.home.exists()
