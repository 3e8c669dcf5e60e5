"""The keeper of a VM, beside an emulator that says what a guest never should: a shell in the place of QEMU."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.to_thread
import pytest

from hutch.engine import record
from hutch.engine.launcher import Launch, encode, open_logs
from hutch.engine.vm import launch as vm_launch
from hutch.host.binary import agent_path
from hutch.host.proc import Process, poll_until

if TYPE_CHECKING:
    import socket

pytestmark = [pytest.mark.anyio, pytest.mark.root]

OPEN, CLOSE, DATA, CREDIT = 1, 2, 3, 4
READY, UP, FAILED, LOG, EXIT, OFF = 16, 18, 19, 20, 21, 22
CREDIT_BYTES = 512 * 1024


def frame(kind: int, payload: bytes = b"", number: int = 0) -> bytes:
    return struct.pack("<IHBx", len(payload), number, kind) + payload


def say(data: bytes) -> str:
    """A shell command that writes bytes to the line."""
    return "printf '" + "".join(f"\\{byte:03o}" for byte in data) + "' >&3"


class Kept(NamedTuple):
    """A keeper, and the folder of its box."""

    process: Process
    directory: Path

    def connect(self) -> socket.socket:
        connection = record.connect(self.directory)
        connection.setblocking(True)
        connection.settimeout(10)
        return connection

    async def ends(self) -> bool:
        return await poll_until(lambda: not self.process.alive(), 10)


async def keep(
    directory: Path,
    script: str,
    *,
    file: Path | None = None,
    comes_up: bool = True,
    commit: bool = True,
    seconds: float = 20,
) -> Kept:
    """Start a keeper whose emulator boots at once, comes up when it is resumed, and then runs the script, in which
    ``take 8`` waits for the first connection. ``file``: one that it sees at its own place."""
    (directory / "run").mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    # The shell finds no programs, so each is asked of it by its path.
    functions = {
        "cat": f'{busybox} cat "$@"',
        "take": f"{busybox} dd bs=1 count=$1 <&3 >/dev/null 2>&1",
        "head": f'{busybox} head "$@"',
        "sleep": f'{busybox} sleep "$@"',
    }
    defined = " ".join(f"{name}() {{ {body}; }};" for name, body in functions.items())
    # The shell is static, and no loader gives it the guard, which would move the line (agent/guard/guard.c).
    script = f"exec 3>&5 5>&-; {defined} {say(frame(READY))}; take 9; {say(frame(UP)) if comes_up else ':'}; {script}"
    user = f"{vm_launch.USER}:{vm_launch.USER}:{vm_launch.USER}"
    records = [
        ("stage", str(directory / "run")),
        ("user", user),
        ("bind", busybox),
        ("bind", "/dev/null"),
        ("bind", "/dev/zero"),
    ]
    records += [("bind", str(file))] if file else []
    records += [("argument", word) for word in (busybox, "sh", "-c", script)]
    console = os.open(directory / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    launch = Launch(agent_path(), "vm")
    try:
        with anyio.fail_after(seconds), record.listen(directory) as listener:
            logs = open_logs(directory)
            launch.hand_over(encode(records), [listener.fileno(), *logs, console])
            for fd in (*logs, console):
                os.close(fd)
            await launch.until(b"B")
            launch.send(b"V\0")
            process = await launch.until(b"R")
            if commit:
                await launch.commit()
    finally:
        await launch.close()
    return Kept(process, directory)


@pytest.mark.parametrize(
    "rubbish",
    [b"\xff" * 64, struct.pack("<IHBB", 32761, 0, DATA, 0), struct.pack("<IHBB", 0, 0, DATA, 1)],
    ids=["bytes", "too long", "reserved"],
)
async def test_rubbish_ends_the_machine(tmp_path: Path, rubbish: bytes) -> None:
    kept = await keep(tmp_path / "box", f"take 8; {say(rubbish)}; sleep 100")
    with kept.connect():
        assert await kept.ends()


async def test_frames_out_of_place_are_thrown_away(tmp_path: Path) -> None:
    frames = (
        frame(DATA, b"x" * 100, number=77),
        frame(CLOSE, number=78),
        frame(OPEN, number=1),
        frame(READY),
        frame(UP),
        frame(FAILED, b"too late"),
        frame(LOG, b"\x07" + bytes(8) + b"a stream that is none"),
        frame(LOG, b"\x01short"),
        frame(EXIT, b"short"),
        frame(99, b"?"),
    )
    # The first connection gets the number 1; what it sends comes back.
    answer = frame(DATA, b"still here", number=1)
    kept = await keep(tmp_path / "box", f"{say(b''.join(frames))}; take 8; {say(answer)}; sleep 100")
    with kept.connect() as connection:
        assert connection.recv(100) == b"still here"
    assert (kept.directory / "main.log.0").read_bytes() == b""
    assert (kept.directory / "exit").read_bytes() == b""
    assert kept.process.alive()
    await kept.process.kill(5)


async def test_more_than_the_credit_closes_the_connection(tmp_path: Path) -> None:
    """A guest cannot make its keeper hold more than the credit for a host that does not read."""
    header = say(frame(DATA, bytes(32000), number=1)[:8])
    flood = f"i=0; while [ $i -lt 80 ]; do {header}; head -c 32000 /dev/zero >&3; i=$((i+1)); done"
    script = f"take 8; {flood}"
    kept = await keep(tmp_path / "box", f"{script}; sleep 100")
    with kept.connect() as connection:
        await anyio.sleep(0.5)  # reads nothing for a while: there is no event to wait for
        total = 0
        while data := await anyio.to_thread.run_sync(connection.recv, 1 << 20):
            total += len(data)
    assert total <= CREDIT_BYTES + (1 << 20)
    assert kept.process.alive()
    await kept.process.kill(5)


async def test_log_exit_and_orderly_end(tmp_path: Path) -> None:
    log = frame(LOG, b"\x02" + struct.pack("<Q", 5) + b"written")
    end = frame(EXIT, struct.pack("<iBQ", 7, 1, 123))
    kept = await keep(tmp_path / "box", f"take 8; {say(log + end + end + frame(OFF))}; sleep 100")
    with kept.connect():
        assert await kept.ends()
    data = (kept.directory / "main.log.0").read_bytes()
    assert struct.unpack_from("<8xQIB3x", data) == (5, 7, 2)
    assert data[24:] == b"written"
    assert (kept.directory / "exit").read_bytes() == b"exit 7 1 123\n"


async def test_without_a_commit_nothing_stays(tmp_path: Path) -> None:
    kept = await keep(tmp_path / "box", "sleep 100", commit=False)
    assert await kept.ends()


async def test_a_guest_that_is_ready_again_and_again_is_not_waited_out(tmp_path: Path) -> None:
    """Nobody else in the process waits meanwhile, and the limit holds."""
    file = tmp_path / "ready"
    file.write_bytes(frame(READY) * (1 << 20))
    with pytest.raises(TimeoutError):
        await keep(tmp_path / "box", f"while :; do cat {file} >&3; done", file=file, comes_up=False, seconds=2)


async def test_any_frames_beside_any_hosts(tmp_path: Path) -> None:
    """A guest says all that can be said, in any order, while hosts come, write, read a little and go: the keeper goes
    on, and takes no more memory and descriptors than before."""
    chance = random.Random(7)
    kinds = [kind for kind in range(40) if kind != OFF]
    said = bytearray()
    for _ in range(20_000):
        payload = chance.randbytes(chance.choice((0, 1, 4, 9, 13, 100, 1000)))
        if chance.random() < 0.5:
            payload = bytes([chance.randrange(4)]) + payload
        said += frame(chance.choice([*kinds, DATA, DATA, DATA]), payload, number=chance.randrange(12))
    file = tmp_path / "said"
    file.write_bytes(said)
    kept = await keep(tmp_path / "box", f"cat <&3 >/dev/null & while :; do cat {file} >&3; done", file=file)

    def facts() -> tuple[int, int]:
        resident = Path(f"/proc/{kept.process.pid}/statm").read_text().split()[1]
        return int(resident) * 4096, len(os.listdir(f"/proc/{kept.process.pid}/fd"))

    def come_and_go() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(OSError), kept.connect() as connection:  # the guest may close it at any moment
                connection.settimeout(0.02)
                connection.send(bytes(30_000))
                connection.recv(1000)

    before, end = facts(), time.monotonic() + 3
    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(anyio.to_thread.run_sync, come_and_go)
    assert kept.process.alive()
    after = facts()
    assert after[0] < before[0] + (8 << 20) and after[1] <= before[1] + 8
    await kept.process.kill(5)
