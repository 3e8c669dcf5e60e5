"""The tool as a subprocess, on a home of its own that holds one image, `busybox`, or at a server with such a home."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import pytest

from hutch.cli.main import main
from tests import rootfs
from tests.remote.processes import Process

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SECONDS = 15.0
# What forked children should not have to import each.
for module in ("cli.boxes", "cli.images", "cli.run", "engine.container", "runtime.runtime"):
    importlib.import_module(f"hutch.{module}")
ROWS, COLUMNS = 33, 99


class Tool:
    """Runs the tool on one home; ``env``: more of its environment, such as the server to use."""

    def __init__(self, home: Path, **env: str) -> None:
        self.home = home
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HUTCH_")}
        self.env = {**kept, "HUTCH_HOME": str(home), **env}
        self.remote = "HUTCH_URL" in env
        self._processes: list[subprocess.Popen[bytes]] = []

    def argv(self, *words: str) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", "hutch", *words]

    def __call__(
        self, *words: str, input: bytes = b"", code: int | None = 0, **env: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Run it to its end, with a deadline, and check the exit code.

        The process is forked from this one, which has imported everything already: ten times as fast as a new
        interpreter. Its standard streams are files; `popen` starts the real thing on pipes.
        """
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
            files[0].write(input)
            files[0].seek(0)
            pid = os.fork()
            if pid == 0:
                _child([file.fileno() for file in files], {**self.env, **env}, words)
            status = _wait(pid)
            _, out, err = (_content(file) for file in files)
        done = subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(status), out, err)
        assert code is None or done.returncode == code, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
        assert b"Traceback" not in done.stderr or env.get("HUTCH_DEBUG")
        return done

    def text(self, *words: str, **options: Any) -> str:
        """Run it and return its standard output."""
        return self(*words, **options).stdout.decode().strip()

    def json(self, *words: str) -> Any:
        """Run it and return its standard output as a value."""
        return json.loads(self(*words).stdout)

    def boxes(self) -> list[str]:
        """The ids of all boxes."""
        return self.text("ls", "-q").split()

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start it with pipes."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(self.argv(*words), env=self.env, **{**pipes, **options})
        self._processes.append(process)
        return process

    def close(self) -> None:
        """End what still runs and remove all boxes."""
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        if self.remote:
            assert not (self.home / "boxes").exists(), "something was done here instead of at the server"
            self("rm", "--all", "--force")
        elif (self.home / "boxes").is_dir():
            self("--local", "rm", "--all", "--force")
        if self.remote and (volumes := self.text("volume", "ls", "-q").split()):
            self("volume", "rm", *volumes)


def _child(descriptors: list[int], env: dict[str, str], words: Sequence[str]) -> NoReturn:
    code = 70
    try:
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.clear()
        os.environ.update(env)
        code = main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int) -> int:
    descriptor = os.pidfd_open(pid)
    try:
        if not select.select([descriptor], [], [], SECONDS)[0]:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(descriptor)
    return os.waitpid(pid, 0)[1]


def _content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


class Terminal:
    """The tool on a terminal of its own, as its controlling terminal."""

    def __init__(self, tool: Tool, *words: str) -> None:
        self.master, self.slave = os.openpty()
        self.resize(ROWS, COLUMNS)
        self.before = termios.tcgetattr(self.slave)
        self.seen = b""
        self.process = subprocess.Popen(
            tool.argv(*words),
            env=tool.env,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def resize(self, rows: int, columns: int) -> None:
        """Change the window; the kernel tells the tool."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, data: bytes) -> None:
        """Press keys."""
        os.write(self.master, data)

    def expect(self, what: bytes) -> bytes:
        """Read until the text is there; return all up to its end and forget that."""
        deadline = time.monotonic() + SECONDS
        while what not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.master], [], [], left)[0], (what, self.seen)
            self.seen += os.read(self.master, 65536)
        before, found, self.seen = self.seen.partition(what)
        return before + found

    def wait(self) -> int:
        """Wait for the end, reading on; return the exit code."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.02)[0]:
                self.seen += os.read(self.master, 65536)
        return self.process.returncode

    @property
    def restored(self) -> bool:
        """Whether the terminal's settings are those from before."""
        return termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        """End the tool and let go of the terminal."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for fd in (self.master, self.slave):
            os.close(fd)


@pytest.fixture(scope="session")
def image_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the image, to be copied."""
    place = tmp_path_factory.mktemp("cli")
    tool = Tool(place / "home")
    tool("image", "import", str(rootfs.build(place / "rootfs")), "busybox")
    return tool.home


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Tool]:
    """The tool on an empty home."""
    tool = Tool(tmp_path / "home")
    yield tool
    tool.close()


KEY = "a-key-for-the-tool"


@pytest.fixture(scope="session")
def server(image_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server on a home with the image."""
    home = tmp_path_factory.mktemp("served") / "home"
    subprocess.run(["cp", "-a", image_home, home], check=True)
    with Process("-m", "hutch", "--home", home, "serve", "--port", "{port}", "--api-key", KEY) as process:
        yield process


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is done with the tool is done twice: on this machine, and at a server. Marked `here` or `there`:
    only once."""
    if "place" in metafunc.fixturenames:
        only = {"here": "local", "there": "remote"}
        places = [place for mark, place in only.items() if metafunc.definition.get_closest_marker(mark)]
        metafunc.parametrize("place", places or list(only.values()), scope="function")


@pytest.fixture
def hutch(image_home: Path, tmp_path: Path, place: str, request: pytest.FixtureRequest) -> Iterator[Tool]:
    """The tool, where there is the image; boxes are removed afterwards."""
    if place == "local":
        subprocess.run(["cp", "-a", image_home, tmp_path / "home"], check=True)
        tool = Tool(tmp_path / "home")
    else:
        tool = Tool(tmp_path / "home", HUTCH_URL=request.getfixturevalue("server").url, HUTCH_API_KEY=KEY)
    yield tool
    tool.close()


@pytest.fixture
def terminal(hutch: Tool) -> Iterator[Any]:
    """A function that starts the tool on a terminal."""
    with contextlib.ExitStack() as stack:

        def start(*words: str) -> Terminal:
            made = Terminal(hutch, *words)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def read_line() -> Any:
    """A function that reads one line of a process's output, with a deadline."""

    def read(process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([process.stdout], [], [], SECONDS)[0], line
            piece = os.read(process.stdout.fileno(), 1)
            if not piece:
                break
            line += piece
        return line

    return read


@pytest.fixture
def finish() -> Any:
    """A function that waits for a process, with a deadline, and returns (code, rest of stdout, stderr)."""

    def wait(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
        out, err = process.communicate(timeout=SECONDS)
        return process.returncode, out, err

    return wait
