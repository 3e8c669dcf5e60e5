"""What a command starts with, and how a start fails."""

from __future__ import annotations

import pwd
import resource
import struct
from typing import TYPE_CHECKING

import pytest

from .client import Client, Fault, Kind, shell, start_payload
from .support import records

if TYPE_CHECKING:
    from pathlib import Path


def test_start_failures_are_typed(client: Client, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("echo\n")
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fnot a program")
    broken.chmod(0o755)
    orphaned = tmp_path / "orphaned"
    orphaned.write_text("#!/no/such/interpreter\n")
    orphaned.chmod(0o755)
    cases = [
        (start_payload(["foo-not-there"]), Fault.COMMAND_NOT_FOUND, "command not found: 'foo-not-there'"),
        (start_payload(["/no/such"]), Fault.COMMAND_NOT_FOUND, "command not found: '/no/such'"),
        (start_payload([""]), Fault.COMMAND_NOT_FOUND, "command not found: ''"),
        (start_payload(["/etc/passwd/x"]), Fault.COMMAND_NOT_FOUND, "'/etc/passwd/x'"),
        (start_payload(["true"], env=["PATH="]), Fault.COMMAND_NOT_FOUND, "'true'"),
        (start_payload([str(plain)]), Fault.NOT_EXECUTABLE, "Permission denied"),
        (start_payload(["plain"], env=[f"PATH={tmp_path}"]), Fault.NOT_EXECUTABLE, "'plain'"),
        (start_payload(["/tmp"]), Fault.NOT_EXECUTABLE, "'/tmp'"),
        (start_payload([str(broken)]), Fault.NOT_EXECUTABLE, "exec format error"),
        (start_payload([str(orphaned)]), Fault.NOT_EXECUTABLE, "interpreter"),
        (start_payload(["true"], cwd="/x"), Fault.BAD_CWD, "working directory '/x': No such file or directory"),
        (start_payload(["true"], cwd="/etc/passwd"), Fault.BAD_CWD, "Not a directory"),
        (start_payload(["true"], user="who"), Fault.BAD_USER, "user 'who'"),
        (start_payload(["true"], user="root:who"), Fault.BAD_USER, "no such group"),
        (start_payload(["true"], user="a:b:c"), Fault.BAD_USER, "user[:group]"),
        (start_payload(["true"], limits=[(99, 1, 1)]), Fault.START_FAILED, "resource limit 99"),
        (start_payload([]), Fault.INVALID, "no command"),
        (start_payload(["a\0b"]), Fault.INVALID, "NUL"),
        (start_payload(["true"], env=["NOVALUE"]), Fault.INVALID, "NAME=value"),
        (start_payload(["true"], tty=(0, 80)), Fault.INVALID, "size of zero"),
        (start_payload(["true"], flags=64), Fault.INVALID, "flag"),
        (start_payload(["true"]) + struct.pack("<HHI", 12, 0, 0), Fault.INVALID, "unknown attribute"),
        (start_payload(["true"])[:-1], Fault.INVALID, "cut short"),
    ]
    for number, (payload, code, text) in enumerate(cases):
        reply = client.start(f"s{number}", payload)
        assert reply.type == Kind.FAILED, (number, reply)
        assert reply.failure[0] == code and text in reply.failure[1], (number, reply.failure)
    assert records(client) == {}, "a failed start left an execution"
    assert client.start("", start_payload(["true"])).failure[0] == Fault.INVALID
    assert struct.unpack("<7Q", client.request(Kind.STATS).payload)[1] == 0


def test_a_failed_start_frees_its_id(client: Client) -> None:
    assert client.start("a", start_payload(["nope"])).type == Kind.FAILED
    assert client.run("a", start_payload(["true"])).status == 0


def test_control_characters_do_not_pass_into_messages(client: Client) -> None:
    assert client.start("a", start_payload(["a\n\x1b[31m"])).failure[1] == "command not found: 'a??[31m'"


def test_path_search(client: Client, tmp_path: Path) -> None:
    for name, mode in (("one", 0o644), ("two", 0o755)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "tool"
        file.write_text(f"#!/bin/sh\necho {name}\n")
        file.chmod(mode)
    env = [f"PATH=/nowhere:{tmp_path}/one:{tmp_path}/two"]
    assert client.run("a", start_payload(["tool"], env=env)).stdout == b"two\n"
    assert client.run("b", start_payload(["./tool"], env=env, cwd=f"{tmp_path}/two")).stdout == b"two\n"
    assert client.run("c", start_payload(["tool"], env=["PATH="], cwd=f"{tmp_path}/two")).stdout == b"two\n"
    assert client.run("d", start_payload(["true"], env=[])).status == 0, "no PATH: the usual directories"


def test_an_id_is_never_run_twice(client: Client, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    client.run("a", shell(f"echo x >>{mark}"))
    assert client.start("a", shell(f"echo x >>{mark}")).failure[0] == Fault.EXISTS
    assert client.request(Kind.FORGET, id="a").type == Kind.OK
    assert client.start("a", shell(f"echo x >>{mark}")).failure[0] == Fault.EXISTS, "it existed: it stays used"
    assert mark.read_text() == "x\n"


def test_environment_is_exactly_what_was_given(client: Client) -> None:
    seen = client.run("a", start_payload(["/usr/bin/env"], env=["A=1", "B==x", "HOME=/h"]))
    assert seen.stdout == b"A=1\nB==x\nHOME=/h\n"
    seen = client.run("b", start_payload(["/usr/bin/env"], env=[]))
    assert seen.stdout == f"HOME={pwd.getpwuid(0).pw_dir}\n".encode()


def test_a_command_starts_clean(client: Client) -> None:
    """Own session and group, default signals, empty mask, descriptors 0 to 2 only, umask 022, nothing inherited."""
    script = """
import os
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
fds = sorted(int(f) for f in os.listdir("/proc/self/fd"))
print(os.getpid() == os.getpgrp() == os.getsid(0), status["SigBlk"].strip(), status["Umask"].strip(), fds[:3], len(fds))
print(open("/proc/self/oom_score_adj").read().strip(), os.readlink("/proc/self/fd/0"), os.getcwd())
"""
    seen = client.run("a", start_payload(["python3", "-c", script]))
    assert seen.stdout == b"True 0000000000000000 0022 [0, 1, 2] 4\n500 /dev/null /\n", seen.stderr
    seen = client.run("b", start_payload(["grep", "SigIgn", "/proc/self/status"]))
    assert seen.stdout.split() == [b"SigIgn:", b"0" * 16]


def test_rlimits(client: Client) -> None:
    limits = [(resource.RLIMIT_NOFILE, 33, 44), (resource.RLIMIT_CPU, 100, 200)]
    seen = client.run("a", shell("ulimit -Sn; ulimit -Hn; ulimit -St", limits=limits))
    assert seen.stdout == b"33\n44\n100\n"


@pytest.mark.root
def test_users(client: Client) -> None:
    show = "id -u; id -g; id -G; echo $HOME"
    assert client.run("a", shell(show, user="nobody")).stdout == b"65534\n65534\n65534\n/nonexistent\n"
    assert client.run("b", shell(show, user="12345")).stdout == b"12345\n0\n0\n/\n"
    assert client.run("c", shell(show, user="12345:777")).stdout == b"12345\n777\n777\n/\n"
    assert client.run("d", shell(show, user="daemon:adm")).stdout.split()[:3] == [b"1", b"4", b"4"]
    assert client.run("e", shell(show, user="")).stdout.split()[:2] == [b"0", b"0"]
    seen = client.run("f", shell("grep CapEff /proc/self/status", user="nobody"))
    assert seen.stdout.split() == [b"CapEff:", b"0" * 16]


@pytest.mark.root
def test_an_ordinary_user_may_reopen_its_streams(client: Client) -> None:
    script = "echo a > /dev/stdout; echo b > /dev/stderr; head -c1 /dev/stdin > /dev/null && echo c"
    client.start("a", shell(script, user="nobody", flags=5))
    client.send(Kind.STDIN, b"x", id="a")
    seen = client.watch("a")
    assert (seen.stdout, seen.stderr) == (b"a\nc\n", b"b\n")
    seen = client.run("b", shell("echo t > $(tty)", user="nobody", tty=(24, 80)))
    assert seen.stdout == b"t\r\n"


@pytest.mark.root
def test_cwd_is_entered_as_the_user(client: Client, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    reply = client.start("a", start_payload(["true"], cwd=str(secret), user="nobody"))
    assert reply.failure[0] == Fault.BAD_CWD and "Permission denied" in reply.failure[1]
