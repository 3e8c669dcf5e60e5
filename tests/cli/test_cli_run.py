"""run, exec and attach, as a shell sees them: bytes, exit codes, signals, closed pipes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root

# Says when it is ready, and what it got.
TRAPS = "trap 'echo INT' INT; trap 'echo TERM; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
IGNORES = "trap '' INT TERM; echo ready; while :; do sleep 0.05; done"


def test_streams_and_exit_code(hutch: Any) -> None:
    done = hutch("run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 7", code=7)
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")
    assert hutch.boxes() == []


def test_death_by_signal(hutch: Any) -> None:
    hutch("run", "--rm", "busybox", "sh", "-c", "kill -9 $$", code=137)
    hutch("create", "--name", "b", "busybox")
    hutch("exec", "b", "sh", "-c", "kill -15 $$", code=143)


def test_short_commands_lose_nothing(hutch: Any) -> None:
    for number in range(8):
        assert hutch("run", "--rm", "busybox", "echo", str(number)).stdout == b"%d\n" % number


def test_settings_reach_the_command(hutch: Any, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("A=file\nB=file\n")
    words = ["-w", "/tmp", "-u", "1000:50", "-e", "A=1", "-e", "PASSED", "--env-file", str(tmp_path / "env")]
    script = 'echo "$A $B $PASSED"; pwd; id -u; id -g; hostname'
    expected = b"1 file here\n/tmp\n1000\n50\n"
    done = hutch("run", "--rm", "--hostname", "inn", *words, "busybox", "sh", "-c", script, PASSED="here")
    assert done.stdout == expected + b"inn\n"
    hutch("create", "--name", "b", "busybox")
    done = hutch("exec", *words, "b", "--", "sh", "-c", script, PASSED="here")
    assert done.stdout.startswith(expected)


def test_large_binary_data_both_ways(hutch: Any) -> None:
    data = os.urandom(10 << 20)
    hutch("create", "--name", "b", "busybox")
    for words in (["exec", "-i", "b", "--", "cat"], ["run", "--rm", "-i", "busybox", "cat"]):
        out, err = hutch.popen(*words, stdin=subprocess.PIPE).communicate(data, timeout=30)
        assert (len(out), err) == (len(data), b"")
        assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


def test_a_command_that_does_not_read_its_input(hutch: Any) -> None:
    hutch("create", "--name", "b", "busybox")
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        process = hutch.popen("exec", "-i", "b", "sh", "-c", "exit 3", stdin=endless.stdout)
        assert process.wait(15) == 3
        endless.kill()


def test_closed_standard_streams(hutch: Any) -> None:
    hutch("create", "--name", "b", "busybox")
    script = '"$@" <&- >&-'
    words = hutch.argv("exec", "-i", "b", "sh", "-c", "cat; echo out; echo err >&2; exit 4")
    done = subprocess.run(["sh", "-c", script, "sh", *words], env=hutch.env, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (4, b"", b"err\n")


def test_output_comes_at_once(hutch: Any, read_line: Any, finish: Any) -> None:
    hutch("create", "--name", "b", "busybox")
    process = hutch.popen("exec", "-i", "b", "sh", "-c", "echo first; read x; echo got $x", stdin=subprocess.PIPE)
    assert read_line(process) == b"first\n"
    process.stdin.write(b"word\n")
    process.stdin.close()
    process.stdin = None
    assert finish(process)[:2] == (0, b"got word\n")


@pytest.mark.parametrize("source", ["file", "null"])
def test_stdin_from_a_file(hutch: Any, tmp_path: Path, source: str) -> None:
    (tmp_path / "file").write_bytes(b"x" * 200_000)
    hutch("create", "--name", "b", "busybox")
    with open(tmp_path / "file" if source == "file" else os.devnull, "rb") as file:
        done = subprocess.run(
            hutch.argv("exec", "-i", "b", "wc", "-c"), stdin=file, capture_output=True, env=hutch.env, timeout=30
        )
    assert done.stdout.strip() == (b"200000" if source == "file" else b"0")


def test_stdin_is_not_taken_without_i(hutch: Any) -> None:
    hutch("create", "--name", "b", "busybox")
    assert hutch("exec", "b", "cat", input=b"secret").stdout == b""


def test_timeouts_end_the_command_and_say_so(hutch: Any) -> None:
    script = "echo before; sleep 60"
    done = hutch("run", "--rm", "--timeout", "500ms", "busybox", "sh", "-c", script, code=143)
    assert (done.stdout, done.stderr) == (b"before\n", b"timed out after 0.5s\n")
    hutch("create", "--name", "b", "busybox")
    done = hutch("exec", "--timeout", "0.5", "b", "sh", "-c", script, code=143)
    assert (done.stdout, done.stderr) == (b"before\n", b"timed out after 0.5s\n")
    assert hutch.json("inspect", "b")[0]["state"] == "running"


def test_errors_are_one_line(hutch: Any) -> None:
    hutch("create", "--name", "b", "busybox")
    for words in (
        ["exec", "b", "no-such-program"],
        ["run", "--rm", "busybox", "no-such-program"],
        ["exec", "nobody", "true"],
        ["run", "--pull", "never", "no-such-image"],
        ["exec", "-w", "/no/such/dir", "b", "true"],
    ):
        done = hutch(*words, code=1)
        assert done.stdout == b""
        assert done.stderr.startswith(b"Error: ") and done.stderr.count(b"\n") == 1
    assert len(hutch.boxes()) == 1


def test_debugging_shows_where(hutch: Any) -> None:
    assert b"Traceback" in hutch("exec", "nobody", "true", code=1, HUTCH_DEBUG="1").stderr


def test_a_terminal_is_demanded_before_anything_is_made(hutch: Any) -> None:
    for words in (["run", "-it", "busybox", "sh"], ["exec", "-t", "b", "sh"]):
        assert b"terminal" in hutch(*words, code=1).stderr
    assert hutch.boxes() == []


def test_a_closed_pipe_ends_quietly(hutch: Any, read_line: Any, finish: Any) -> None:
    process = hutch.popen("run", "--rm", "busybox", "yes")
    assert read_line(process) == b"y\n"
    process.stdout.close()
    code, _, err = finish(process)
    assert (code, err) == (141, b"")
    assert hutch.boxes() == []


def test_a_table_into_a_closed_pipe(hutch: Any) -> None:
    process = hutch.popen("ls")
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == b""


def test_ctrl_c_goes_to_the_command(hutch: Any, read_line: Any, finish: Any) -> None:
    process = hutch.popen("run", "--rm", "busybox", "sh", "-c", TRAPS)
    assert read_line(process) == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert read_line(process) == b"INT\n"
    process.send_signal(signal.SIGINT)
    assert finish(process)[:2] == (5, b"TERM\n")
    assert hutch.boxes() == []


def test_the_third_ctrl_c_leaves(hutch: Any, read_line: Any, finish: Any) -> None:
    process = hutch.popen("run", "--rm", "busybox", "sh", "-c", IGNORES)
    assert read_line(process) == b"ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # signals that are pending together count as one
            process.wait(0.15)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130
    assert hutch.boxes() == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_asked_to_end(hutch: Any, read_line: Any, finish: Any, signum: signal.Signals) -> None:
    process = hutch.popen("run", "--rm", "busybox", "sh", "-c", "echo ready; exec sleep 60")
    assert read_line(process) == b"ready\n"
    process.send_signal(signum)
    assert finish(process)[0] == 128 + signum
    assert hutch.boxes() == []


def test_asked_to_end_with_a_deaf_command(hutch: Any, read_line: Any, finish: Any) -> None:
    process = hutch.popen("run", "--rm", "busybox", "sh", "-c", IGNORES)
    assert read_line(process) == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143
    assert hutch.boxes() == []


def test_a_run_without_rm_keeps_the_box(hutch: Any) -> None:
    hutch("run", "--name", "kept", "busybox", "sh", "-c", "echo hello; exit 3", code=3)
    info = hutch.json("inspect", "kept")[0]
    assert (info["state"], info["exit_code"]) == ("stopped", 3)
    assert hutch("logs", "kept").stdout == b"hello\n"


def test_what_is_started_goes_on_after_the_tool(hutch: Any) -> None:
    hutch(
        "run",
        "--name",
        "kept",
        "-e",
        "X=1",
        "busybox",
        "sh",
        "-c",
        "sleep 0.2; [ -e /again ] && sleep 60; touch /again",
    )
    assert hutch.text("start", "kept") == "kept"
    assert hutch.json("inspect", "kept")[0]["state"] == "running"


def test_detached(hutch: Any) -> None:
    box = hutch.text("run", "-d", "--name", "job", "busybox", "sh", "-c", "echo up; exec sleep 60")
    assert hutch.boxes() == [box]
    assert hutch.json("inspect", "job")[0]["state"] == "running"
    assert hutch.text("exec", "job", "cat", "/etc/release") == "hutch test image"
    hutch("exec", box[:6], "sh", "-c", "exit 5", code=5)
    hutch("rm", "-f", "job")


def test_exec_detached(hutch: Any) -> None:
    hutch("create", "--name", "b", "busybox")
    execution = hutch.text("exec", "-d", "b", "sh", "-c", "echo later; sleep 60")
    process = hutch.popen("attach", "--no-stdin", "b", execution)
    assert process.stdout.readline() == b"later\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


def test_attach_sees_what_was_written(hutch: Any, read_line: Any, finish: Any) -> None:
    hutch("run", "-d", "-i", "--name", "job", "busybox", "sh", "-c", "echo one; read x; echo got $x; exit 4")
    process = hutch.popen("attach", "job", stdin=subprocess.PIPE)
    assert read_line(process) == b"one\n"
    process.stdin.write(b"two\n")
    process.stdin.flush()
    assert read_line(process) == b"got two\n"
    assert finish(process)[0] == 4


@pytest.mark.here
def test_mounts(hutch: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/in").write_text("from the host")
    script = "cat /mnt/in; echo x > /mnt/out && echo wrote"
    assert hutch.text("run", "--rm", "-v", f"{tmp_path}/data:/mnt", "busybox", "sh", "-c", script).endswith("wrote")
    assert (tmp_path / "data/out").read_text() == "x\n"
    read_only = ["-v", f"{tmp_path}/data:/mnt:ro"]
    assert hutch.text("run", "--rm", *read_only, "busybox", "sh", "-c", script, code=1) == "from the host"


def test_managed_volumes(hutch: Any) -> None:
    hutch("volume", "create", "store")
    hutch("run", "--rm", "-v", "store:/s", "busybox", "sh", "-c", "echo kept > /s/f")
    assert hutch.text("run", "--rm", "-v", "store:/s", "busybox", "cat", "/s/f") == "kept"


def test_limits_are_recorded(hutch: Any) -> None:
    hutch("create", "--name", "b", "--memory", "1g", "--cpus", "1", "--disk", "2g", "--pids", "64", "busybox")
    assert hutch.json("inspect", "b")[0]["limits"] == {"cpus": 1, "memory_mib": 1024, "disk_gb": 2, "pids": 64}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--memory", "lots"], b"--memory"),
        (["-m", "0"], b"-m"),
        (["--disk", "-1"], b"--disk"),
        (["--cpus", "1.5"], b"--cpus"),
        (["-v", "nowhere"], b"-v"),
        (["-v", "/no/such/path:/mnt"], b"-v"),
        (["--isolation", "hope"], b"--isolation"),
        (["--pull", "maybe"], b"--pull"),
        (["--timeout", "soon"], b"--timeout"),
        (["-e", "=x"], b"-e"),
        (["--frobnicate"], b"--frobnicate"),
        (["-d", "--timeout", "1"], b"--timeout"),
    ],
)
def test_usage_errors_change_nothing(hutch: Any, words: list[str], named: bytes) -> None:
    done = hutch("run", *words, "busybox", "true", code=2)
    assert named in done.stderr and b"Usage: hutch run" in done.stderr
    assert done.stdout == b""
    assert hutch.boxes() == []


def test_a_volume_that_does_not_exist(hutch: Any) -> None:
    assert b"'absent'" in hutch("run", "-v", "absent:/mnt", "busybox", "true", code=1).stderr
    assert hutch.boxes() == []


@pytest.mark.here
def test_a_killed_run_is_cleaned_up_by_the_next_command(hutch: Any, read_line: Any) -> None:
    process = hutch.popen("run", "--rm", "busybox", "sh", "-c", "echo ready; exec sleep 600")
    assert read_line(process) == b"ready\n"
    process.kill()
    process.wait(30)
    assert hutch.boxes() == []


@pytest.mark.here
def test_what_a_box_is_isolated_by_is_chosen_and_shown(hutch: Any, vm_store: Path) -> None:
    (hutch.home / "vm").rmdir()
    (hutch.home / "vm").symlink_to(vm_store)
    for kind in ("container", "vm"):
        hutch("create", "--name", kind, "--isolation", kind, "busybox")
        (shown,) = hutch.json("inspect", kind)
        assert shown["isolation"] == kind
        assert (hutch.text("exec", kind, "uname", "-r") == os.uname().release) == (kind == "container")
    hutch("fork", "--name", "fork", "vm")
    assert hutch.json("inspect", "fork")[0]["isolation"] == "vm"
    hutch("rm", "-f", "container", "vm", "fork")
