"""Boxes, files, snapshots, images, volumes: what is printed, in which shape, with which exit code."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root


def test_empty_tables_have_headers(empty: Any) -> None:
    for words, header in (
        (["ls"], ["ID", "NAME", "IMAGE", "STATE", "CREATED", "COMMAND"]),
        (["ps"], ["ID", "NAME", "IMAGE", "STATE", "CREATED", "COMMAND"]),
        (["image", "ls"], ["REFERENCE", "DIGEST", "ARCH", "SIZE", "CREATED"]),
        (["volume", "ls"], ["NAME", "ID", "SIZE", "CREATED"]),
    ):
        assert empty.text(*words).split() == header
    for words in (["ls"], ["image", "ls"], ["volume", "ls"], ["stats"]):
        assert empty.json(*words, "--json") == []
        if words != ["stats"]:
            assert empty.text(*words, "-q") == ""


def test_ls(hutch: Any) -> None:
    one = hutch.text("create", "--name", "one", "-l", "k=v", "-l", "x", "busybox", "echo", "a b")
    two = hutch.text("create", "busybox")
    rows = hutch.text("ls").splitlines()
    assert len(rows) == 3
    row = next(row for row in rows if row.startswith(one))
    assert row.split()[:4] == [one, "one", "busybox:latest", "configured"] or row.split()[:4] == [
        one, "one", "busybox", "configured",
    ]  # fmt: skip
    assert "ago" in row or "just now" in row
    assert row.endswith("echo 'a b'")
    assert set(hutch.boxes()) == {one, two}
    assert set(hutch.text("ls", "--names").split()) == {"one", two}
    assert hutch.text("ls", "-q", "-l", "k=v") == one
    assert hutch.text("ls", "-q", "--running") == ""
    listed = {box["id"]: box for box in hutch.json("ls", "--json")}
    assert listed[one]["labels"] == {"k": "v", "x": ""}
    assert listed[one]["command"] == ["echo", "a b"] and listed[two]["command"] is None
    assert hutch.json("inspect", "one", two) == [listed[one], listed[two]]


def test_a_box_cannot_steer_the_terminal(hutch: Any) -> None:
    hutch("create", "busybox", "printf", "\x1b[2J\x07")
    output = hutch("ls").stdout + hutch("inspect", *hutch.boxes()).stdout
    assert b"\x1b" not in output and b"\x07" not in output


def test_life_cycle_of_several(hutch: Any) -> None:
    for name in ("a", "b"):
        hutch("create", "--name", name, "busybox")
    assert sorted(hutch.text("start", "a", "b").split()) == ["a", "b"]
    assert [box["state"] for box in hutch.json("inspect", "a", "b")] == ["running", "running"]
    done = hutch("stop", "a", "nobody", "b", code=1)
    assert sorted(done.stdout.split()) == [b"a", b"b"]
    assert done.stderr.startswith(b"Error: ") and b"nobody" in done.stderr
    assert [box["state"] for box in hutch.json("inspect", "a", "b")] == ["stopped", "stopped"]
    assert b"stopped" in hutch("exec", "a", "true", code=1).stderr
    assert hutch.text("restart", "--timeout", "1", "a") == "a"
    assert hutch.text("exec", "a", "echo", "again") == "again"
    assert hutch.text("pause", "a") == "a"
    assert [box["state"] for box in hutch.json("inspect", "a")] == ["paused"]
    assert b"paused" in hutch("exec", "a", "true", code=1).stderr
    assert hutch.text("unpause", "a") == "a"
    assert hutch.text("exec", "a", "echo", "on") == "on"
    assert b"isolation 'vm'" in hutch("fork", "a", code=1).stderr
    assert b"a" in hutch("rm", "a", code=1).stderr
    assert hutch.text("kill", "a") == "a"
    assert sorted(hutch.text("rm", "a", "b").split()) == ["a", "b"]
    assert hutch.boxes() == []


def test_kill_sends_the_signal(hutch: Any, read_line: Any, finish: Any) -> None:
    hutch(
        "run",
        "-d",
        "--name",
        "j",
        "busybox",
        "sh",
        "-c",
        "trap 'echo usr; exit 6' USR1; echo ready; while :; do sleep 0.05; done",
    )
    process = hutch.popen("logs", "-f", "j")
    assert read_line(process) == b"ready\n"
    hutch("kill", "-s", "USR1", "j")
    assert finish(process)[:2] == (0, b"usr\n")
    assert hutch.json("inspect", "j")[0]["exit_code"] == 6


def test_rm_all(hutch: Any) -> None:
    hutch("create", "busybox")
    hutch("run", "-d", "busybox", "sleep", "60")
    assert b"usage" in hutch("rm", code=2).stderr.lower()
    done = hutch("rm", "--all", code=1)
    assert b"Remove all 2 boxes (1 of them running)" in done.stderr
    assert len(hutch.boxes()) == 2
    assert len(hutch.text("rm", "--all", input=b"y\n").split()) == 2
    assert hutch.boxes() == []
    hutch("rm", "--all", "-f")


def test_logs(hutch: Any) -> None:
    hutch("create", "--name", "idle", "busybox")
    done = hutch("logs", "idle")
    assert done.stdout == b"" and b"no log" in done.stderr
    hutch("run", "--name", "j", "busybox", "sh", "-c", "echo one; echo two; echo err >&2; printf three")
    done = hutch("logs", "j")
    assert (done.stdout, done.stderr) == (b"one\ntwo\nthree", b"err\n")
    assert hutch("logs", "-f", "j").stdout == b"one\ntwo\nthree"
    stamped = hutch("logs", "--timestamps", "j").stdout.splitlines()
    assert [line.split(b"Z ", 1)[1] for line in stamped] == [b"one", b"two", b"three"]
    assert all(line.startswith(b"20") for line in stamped)
    assert b"one" not in hutch("logs", "--tail", "1", "j").stdout


def test_cp(hutch: Any, tmp_path: Path) -> None:
    hutch("create", "--name", "b", "busybox")
    (tmp_path / "f").write_bytes(bytes(range(256)))
    hutch("cp", str(tmp_path / "f"), "b:/tmp/")
    hutch("cp", "b:/tmp/f", str(tmp_path / "g"))
    assert (tmp_path / "g").read_bytes() == bytes(range(256))
    assert hutch("cp", "-n", "b:/tmp/f", str(tmp_path / "g"), code=1).stderr.startswith(b"Error: ")
    hutch("cp", "b:/etc", str(tmp_path / "tree"))
    assert (tmp_path / "tree/release").read_text() == "hutch test image\n"
    assert b"/no/such" in hutch("cp", "b:/no/such", str(tmp_path / "h"), code=1).stderr
    for pair in (["b:/a", "b:/c"], ["/a", "./b:c"]):
        assert b"exactly one" in hutch("cp", *pair, code=2).stderr


def test_stats(hutch: Any) -> None:
    hutch("run", "-d", "--name", "j", "--memory", "128m", "busybox", "sleep", "60")
    header, row = hutch.text("stats").splitlines()
    assert header.split()[:2] == ["ID", "NAME"] and row.split()[1] == "j"
    (usage,) = hutch.json("stats", "--json", "j")
    assert usage["name"] == "j" and usage["uptime_seconds"] >= 0 and "memory_bytes" in usage
    assert hutch("stats", "nobody", code=1).stderr.startswith(b"Error: ")


def test_snapshots_and_copies(hutch: Any, tmp_path: Path) -> None:
    hutch("create", "--name", "b", "busybox")
    hutch("exec", "b", "sh", "-c", "echo first > /f")
    assert hutch.text("snapshot", "create", "b", "s1") == "s1"
    hutch("exec", "b", "sh", "-c", "echo second > /f")
    assert hutch.text("snapshot", "ls", "-q", "b") == "s1"
    assert [s["name"] for s in hutch.json("snapshot", "ls", "b", "--json")] == ["s1"]
    assert hutch("snapshot", "restore", "b", "s1", code=1).stderr.startswith(b"Error: ")
    hutch("clone", "b", "--name", "c")
    hutch("export", "b", str(tmp_path / "b.box"))
    hutch("stop", "b")
    hutch("snapshot", "restore", "b", "s1")
    hutch("start", "b")
    assert hutch.text("exec", "b", "cat", "/f") == "first"
    assert hutch.text("exec", "c", "cat", "/f") == "second"
    hutch("import", str(tmp_path / "b.box"), "--name", "d")
    assert hutch.text("exec", "d", "cat", "/f") == "second"
    assert hutch.text("snapshot", "rm", "b", "s1") == "s1"
    assert hutch.json("snapshot", "ls", "b", "--json") == []


@pytest.mark.here
def test_images(hutch: Any) -> None:
    (image,) = hutch.json("image", "ls", "--json")
    assert hutch.text("image", "ls", "-q") == image["digest"]
    assert hutch.text("image", "ls", "--names") == image["references"][0]
    assert hutch.json("image", "inspect", "busybox") == [image]
    assert json.loads(hutch("image", "inspect", "busybox", "absent", code=1).stdout) == [image]
    hutch("create", "busybox")
    hutch("rm", "--all", "-f")
    assert hutch.text("image", "rm", "busybox")
    assert hutch.json("image", "ls", "--json") == []
    assert "freed" in hutch.text("image", "prune")
    assert hutch.json("image", "prune", "--json")["freed_bytes"] == 0


def test_volumes(empty: Any) -> None:
    assert empty.text("volume", "create", "one", "two").split() == ["one", "two"]
    assert sorted(empty.text("volume", "ls", "-q").split()) == ["one", "two"]
    assert [v["name"] for v in empty.json("volume", "inspect", "one")] == ["one"]
    done = empty("volume", "rm", "one", "absent", "two", code=1)
    assert done.stdout.split() == [b"one", b"two"] and b"absent" in done.stderr


def test_info_and_doctor(empty: Any) -> None:
    facts = empty.json("info", "--json")
    assert facts["home"] == str(empty.home)
    assert f"home:          {empty.home}" in empty.text("info")
    checks = empty.json("doctor", "--json")
    assert {"name", "status", "found", "gives", "remedy", "needed"} == set(checks[0])
    assert "Boxes can run." in empty.text("doctor")
    broken = empty("doctor", code=1, HUTCH_AGENT="/no/such/agent")
    assert b"make -C agent" in broken.stdout


def test_the_home_option(empty: Any, tmp_path: Path) -> None:
    for words in (["--home", str(tmp_path / "x"), "info"], ["info", "--home", str(tmp_path / "x")]):
        assert empty.json(*words, "--json")["home"] == str(tmp_path / "x")


def test_help_and_usage(empty: Any) -> None:
    assert "Usage: hutch" in empty.text("--help")
    assert empty.text("--version").startswith("hutch ")
    assert "Examples:" in empty.text("run", "--help")
    assert "image pull" in empty.text("image", "--help")
    for words in (
        [],
        ["image"],
        ["nope"],
        ["image", "nope"],
        ["run"],
        ["exec", "b"],
        ["--nope"],
        ["completion", "tcsh"],
    ):
        done = empty(*words, code=2)
        assert done.stdout == b"" and b"hutch" in done.stderr
    assert b"did you mean 'restart'" in empty("restar", code=2).stderr
    assert not empty.home.exists()


def test_help_is_fast(empty: Any) -> None:
    """In processor time, which is what it takes on a machine with nothing else to do."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert empty.popen("--help").wait(10) == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.15


@pytest.mark.here
def test_commands_import_only_what_they_need(hutch: Any) -> None:
    hutch("create", "--name", "b", "busybox")
    script = (
        "import sys; from hutch.cli.main import main; code = main(['exec', 'b', 'true']); "
        "print([name for name in ('rich', 'httpx2', 'hutch.image.registry') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=hutch.env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
