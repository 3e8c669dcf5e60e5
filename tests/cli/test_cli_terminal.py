"""-it on a real terminal: raw mode and back, size, keys."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

pytestmark = pytest.mark.root


@pytest.fixture
def box(hutch: Any) -> str:
    hutch("create", "--name", "b", "busybox")
    return "b"


def test_a_shell(terminal: Any, box: str) -> None:
    shell = terminal("exec", "-it", box, "sh")
    shell.expect(b"# ")
    assert not shell.restored
    shell.type(b"tty; stty size; echo $TERM\r")
    assert b"33 99" in shell.expect(b"xterm\r\n")
    shell.resize(40, 120)
    shell.type(b"stty size\r")
    shell.expect(b"40 120")
    shell.type(b"exit 9\r")
    assert shell.wait() == 9
    assert shell.restored


def test_ctrl_c_is_a_key_for_the_command(terminal: Any, box: str) -> None:
    shell = terminal(
        "exec", "-it", box, "sh", "-c", "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.05; done"
    )
    shell.expect(b"ready")
    shell.type(b"\x03")
    shell.expect(b"caught")
    assert shell.wait() == 3
    assert shell.restored


def test_end_of_file_key(terminal: Any, box: str) -> None:
    shell = terminal("exec", "-it", box, "sh", "-c", "echo ready; cat")
    shell.expect(b"ready")
    shell.type(b"hello\r\x04")
    shell.expect(b"hello\r\nhello\r\n")
    assert shell.wait() == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_restored_when_asked_to_end(terminal: Any, box: str, signum: signal.Signals) -> None:
    shell = terminal("exec", "-it", box, "sh", "-c", "trap '' TERM HUP; echo ready; while :; do sleep 0.05; done")
    shell.expect(b"ready")
    os.kill(shell.process.pid, signum)
    assert shell.wait() == 128 + signum
    assert shell.restored


def test_restored_when_the_command_cannot_start(terminal: Any, box: str) -> None:
    shell = terminal("exec", "-it", box, "no-such-program")
    assert shell.wait() == 1
    assert shell.restored


def test_run_and_detach_and_attach(terminal: Any, hutch: Any) -> None:
    shell = terminal("run", "-it", "--name", "t", "busybox", "sh")
    shell.expect(b"# ")
    shell.type(b"x=kept\r")
    shell.expect(b"# ")
    shell.type(b"\x10\x11")
    assert shell.wait() == 0
    assert shell.restored
    assert hutch.json("inspect", "t")[0]["state"] == "running"
    again = terminal("attach", "t")
    again.expect(b"# ")
    again.type(b"echo is-$x; stty size\r")
    assert b"33 99" in again.expect(b"is-kept") + again.expect(b"99")
    again.type(b"exit 6\r")
    assert again.wait() == 6
    assert again.restored


def test_the_size_is_there_from_the_start(terminal: Any, hutch: Any) -> None:
    shell = terminal("run", "--rm", "-it", "busybox", "sh", "-c", "stty size; exit 2")
    shell.expect(b"33 99")
    assert shell.wait() == 2
    assert hutch.boxes() == []
