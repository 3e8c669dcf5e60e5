"""The tool as a subprocess, with a home of its own that holds one image, `busybox`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING, Any

import pytest

import rootfs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SECONDS = 30.0
ROWS, COLUMNS = 33, 99


class Tool:
    """Runs the tool on one home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {**os.environ, "HUTCH_HOME": str(home)}
        self.env.pop("HUTCH_DEBUG", None)

    def argv(self, *words: str) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", "hutch", *words]

    def __call__(
        self, *words: str, input: bytes = b"", code: int | None = 0, **env: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Run it to its end, with a deadline, and check the exit code."""
        done = subprocess.run(
            self.argv(*words), input=input, capture_output=True, timeout=SECONDS, env={**self.env, **env}
        )
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
        return subprocess.Popen(
            self.argv(*words),
            env=self.env,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )


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
def empty(tmp_path: Path) -> Tool:
    """The tool on an empty home."""
    return Tool(tmp_path / "home")


@pytest.fixture
def hutch(image_home: Path, tmp_path: Path) -> Iterator[Tool]:
    """The tool on a home with the image; boxes are removed afterwards."""
    subprocess.run(["cp", "-a", image_home, tmp_path / "home"], check=True)
    tool = Tool(tmp_path / "home")
    yield tool
    if tool.boxes():
        tool("rm", "--all", "--force")


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
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            raise
        return process.returncode, out, err

    return wait
