"""The execution contract, section 2: flow."""

from __future__ import annotations

import hashlib
import io
import random
import resource
import time
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import InvalidArgumentError, InvalidStateError
from tests.runtime.helpers import BlockingSink, Sink, in_time, sh, until

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.runtime.box import LocalBox

pytestmark = [pytest.mark.root, pytest.mark.anyio]

KIB = 1 << 10
MIB = 1 << 20
WINDOW = 512 * KIB


def numbers(last: int) -> bytes:
    """What ``seq 1 last`` writes."""
    return b"".join(b"%d\n" % n for n in range(1, last + 1))


@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_2_1_a_slow_sink_blocks_its_own_stream_and_nothing_else(box: LocalBox, kind: str) -> None:
    slow = Sink(shut=True) if kind == "async" else BlockingSink()
    release = slow.open if isinstance(slow, Sink) else slow.open.set
    errors = Sink()
    script = (
        "(trap 'echo got usr1 >&2' USR1; while :; do sleep 0.02; done) & ticker=$!; trap '' USR1; "
        "dd if=/dev/zero bs=64k count=64 2>/dev/null & writer=$!; "
        "while read x; do echo answer $x >&2; done; wait $writer; kill $ticker; echo end >&2; exit 21"
    )
    try:
        execution = await box.exec(*sh(script), stdin=True, stdout=slow, stderr=errors)
        with in_time():
            await execution.stdin.write(b"one\n")
            await until(lambda: b"answer one\n" in errors.data)
            # Other executions, in numbers, while the sink takes nothing.
            for number in range(10):
                assert (await box.run("echo", str(number))).stdout == b"%d\n" % number
            other = await box.run(*sh("dd if=/dev/zero bs=64k count=64 2>/dev/null"))
            assert len(other.stdout) == 4 * MIB
            await execution.signal(10)
            await execution.stdin.write(b"two\n")
            await until(lambda: b"answer two\n" in errors.data and b"got usr1\n" in errors.data)
            assert len(slow.data) == 0
            release()
            await execution.stdin.close()
            result = await execution.wait()
    finally:
        release()
    assert result.exit_code == 21
    assert slow.data == bytes(4 * MIB)
    assert errors.data.endswith(b"end\n")


async def test_2_1_the_exit_notice_does_not_wait_for_a_slow_sink(box: LocalBox) -> None:
    slow = Sink(shut=True)
    execution = await box.exec(*sh("echo x; exit 3"), stdout=slow)
    with in_time():
        await slow.called.wait()
        await execution._reaped.wait()
        with pytest.raises(InvalidStateError, match="ended"):
            await execution.signal(15)
        slow.open()
        assert (await execution.wait()).exit_code == 3


async def test_2_1_what_is_on_its_way_to_a_sink_that_does_not_read_is_bounded(box: LocalBox) -> None:
    slow = Sink(shut=True)
    execution = await box.exec(*sh("dd if=/dev/zero bs=64k count=1600 2>/dev/null"), stdout=slow)
    with in_time():
        await slow.called.wait()
        await until(lambda: _quiet(box))
        assert (await box.stats()).output_bytes <= 2 * MIB, "the agent read on although nobody takes the output"
        assert [e.exit_code for e in await box.executions() if e.id == execution.id] == [None]
        slow.open()
        await execution.wait()
    assert len(slow.data) == 100 * MIB


async def test_2_1_ten_megabytes_never_read_do_not_hold_up_others(box: LocalBox) -> None:
    unread = await box.exec(*sh("seq 1 1400000"))  # about 10 MB
    began = time.monotonic()
    with in_time():
        for number in range(20):
            assert (await box.run("echo", str(number))).stdout == b"%d\n" % number
    assert time.monotonic() - began < 5
    with in_time():
        assert await unread.stdout.read() == numbers(1400000)
        assert (await unread.wait()).exit_code == 0


async def test_2_1_many_slow_executions_on_one_channel(box: LocalBox) -> None:
    sinks = [Sink(shut=True) for _ in range(12)]
    executions = [await box.exec(*sh("seq 1 200000"), stdout=sink) for sink in sinks]
    with in_time(30):
        assert (await box.run("echo", "free")).stdout == b"free\n"
        expected = numbers(200000)
        for sink, execution in zip(sinks, executions, strict=True):
            sink.open()
            assert (await execution.wait()).exit_code == 0
            assert sink.data == expected


async def test_2_2_an_unread_execution_is_held_back_and_loses_nothing(box: LocalBox) -> None:
    execution = await box.exec(*sh("seq 1 400000; echo end >&2"))
    await anyio.sleep(1.5)
    with in_time():
        assert [e.exit_code for e in await box.executions() if e.id == execution.id] == [None]
        assert await execution.stdout.read() == numbers(400000)
        result = await execution.wait()
    assert (result.stderr, result.dropped, result.truncated) == (b"end\n", 0, False)


async def test_2_2_after_the_hold_it_runs_on_and_the_reader_is_told_of_the_gap(box: LocalBox) -> None:
    """The one slow test of the suite: the hold is ten seconds."""
    execution = await box.exec(*sh("seq 1 400000; exit 4"))
    began = time.monotonic()
    with in_time(20):
        await until(lambda: _ended(box, execution.id), 18)
    assert 9 < time.monotonic() - began < 16
    with in_time():
        read = await execution.stdout.read()
        result = await execution.wait()
    whole = numbers(400000)
    assert result.exit_code == 4
    assert whole.endswith(read)
    assert 0 < len(read) <= WINDOW
    assert execution.stdout.dropped == result.dropped == len(whole) - len(read)
    assert result.truncated


async def test_2_2_an_orderly_detach_lets_it_run_on_and_the_next_watcher_is_told(box: LocalBox) -> None:
    execution = await box.exec(*sh("seq 1 400000; echo end >&2; exit 5"))
    chunks = aiter(execution.stdout)
    with in_time():
        head = await anext(chunks)
        await execution.close()
        await until(lambda: _ended(box, execution.id))
        sink = Sink()
        again = await box.attach(execution.id, after=(len(head), 0), stdout=sink)
        result = await again.wait()
    whole = numbers(400000)
    assert whole.startswith(head)
    assert whole.endswith(bytes(sink.data))
    assert len(head) + again.stdout.dropped + len(sink.data) == len(whole)
    assert again.stdout.dropped == result.dropped > 0
    assert (result.exit_code, result.stderr, result.truncated) == (5, b"end\n", True)


async def test_2_2_collecting_is_bounded_and_says_so(box: LocalBox) -> None:
    with in_time():
        result = await box.run(*sh("seq 1 100000; echo fine >&2; exit 6"), max_output=1000)
    whole = numbers(100000)
    assert result.stdout == whole[:1000]
    assert (result.exit_code, result.stderr) == (6, b"fine\n")
    assert result.truncated
    assert result.dropped == len(whole) - 1000
    exact = await box.run("printf", "12345", max_output=5)
    assert (exact.stdout, exact.truncated, exact.dropped) == (b"12345", False, 0)
    with pytest.raises(InvalidArgumentError):
        await box.run("true", max_output=-1)


async def test_2_2_a_reader_that_leaves_does_not_hold_up_the_end(box: LocalBox) -> None:
    execution = await box.exec(*sh("seq 1 400000; exit 7"))
    async for _ in execution.stdout:
        break
    with in_time():
        assert (await execution.wait()).exit_code == 7


async def test_2_2_a_stream_has_one_reader(box: LocalBox) -> None:
    execution = await box.exec(*sh("echo a; read x; echo b"), stdin=True)
    chunks = aiter(execution.stdout)
    with in_time():
        assert await anext(chunks) == b"a\n"
        with pytest.raises(InvalidStateError, match="reader"):
            await execution.stdout.read()
        await execution.stdin.write(b"\n")
        assert await anext(chunks) == b"b\n"
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)
        assert (await execution.wait()).exit_code == 0


async def test_2_3_bytes_are_bytes(box: LocalBox) -> None:
    blob = bytes(range(256)) * 4096 + b"\xff\xfe\x00" + "héllo €".encode() + b"\r\n\n\0"
    with in_time():
        result = await box.run("cat", input=blob)
        assert result.stdout == blob
        result = await box.run(*sh("cat >&2"), input=blob)
        assert result.stderr == blob
        sink = io.BytesIO()
        execution = await box.exec("cat", stdin=True, stdout=sink)
        execution.feed(blob)
        await execution.wait()
    assert sink.getvalue() == blob


async def test_2_3_bytes_stay_in_order_through_shared_memory(box: LocalBox, tmp_path: Path) -> None:
    """More than a window, into a file: the way that reads the window in place."""
    path = tmp_path / "out"
    with in_time(30), path.open("wb", buffering=0) as sink:
        execution = await box.exec(*sh("seq 1 3000000"), stdout=sink)
        await execution.wait()
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(numbers(3000000)).digest()


async def test_2_3_a_slow_reader_of_the_shared_window_sees_no_overwritten_byte(box: LocalBox) -> None:
    class Slow(io.RawIOBase):
        """Looks at its bytes late, in uneven pieces."""

        def __init__(self) -> None:
            self.digest = hashlib.sha256()
            self.size = 0
            self.random = random.Random(7)

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            view = memoryview(data)  # type: ignore[arg-type]
            if self.random.random() < 0.1:
                time.sleep(0.01)
            taken = max(1, self.random.randrange(len(view) + 1))
            self.digest.update(view[:taken])
            self.size += taken
            return taken

    sink = Slow()
    with in_time(30):
        execution = await box.exec(*sh("seq 1 2000000"), stdout=sink)
        await execution.wait()
    expected = numbers(2000000)
    assert sink.size == len(expected)
    assert sink.digest.digest() == hashlib.sha256(expected).digest()


async def test_2_3_text_is_replaced_not_refused(box: LocalBox) -> None:
    result = await box.run("printf", r"a\xff\xc3\xa9")
    assert result.stdout == b"a\xff\xc3\xa9"
    assert result.text == "a\ufffdé"


async def test_2_4_input_arrives_whole_and_in_order(box: LocalBox) -> None:
    data = random.Random(3).randbytes(8 * MIB + 12345)
    execution = await box.exec("sha256sum", stdin=True)
    with in_time(30):
        at = 0
        for size in (1, 70_000, 3, 2 * MIB, 65536, len(data)):
            await execution.stdin.write(data[at : at + size])
            at += size
        await execution.stdin.close()
        result = await execution.wait()
    assert result.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


async def test_2_4_writers_that_race_do_not_mix_their_pieces(box: LocalBox) -> None:
    execution = await box.exec("cat", stdin=True)
    pieces = [bytes([65 + n]) * 300_000 for n in range(8)]
    with in_time(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(execution.wait)
            async with anyio.create_task_group() as writers:
                for piece in pieces:
                    writers.start_soon(execution.stdin.write, piece)
            await execution.stdin.close()
        out = (await execution.wait()).stdout
    assert sorted(out[at : at + 300_000] for at in range(0, len(out), 300_000)) == pieces


async def test_2_4_input_has_back_pressure(box: LocalBox) -> None:
    execution = await box.exec(*sh("read go; exec cat"), stdin=True)
    sent = 0

    async def write() -> None:
        nonlocal sent
        for _ in range(80):
            await execution.stdin.write(bytes(64 * KIB))
            sent += 64 * KIB
        await execution.stdin.close()

    held = await box.exec("sleep", "60", stdin=True)
    with anyio.move_on_after(0.5) as scope:
        await held.stdin.write(bytes(5 * MIB))
    assert scope.cancelled_caught, "five megabytes went nowhere"
    await held.kill()
    await execution.stdin.write(b"\n")
    with in_time():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            result = await execution.wait()
    assert result.stdout == bytes(80 * 64 * KIB)
    assert sent == 80 * 64 * KIB


async def test_2_4_closing_the_input_gives_end_of_file_once(box: LocalBox) -> None:
    execution = await box.exec(*sh("cat; echo eof"), stdin=True)
    with in_time():
        await execution.stdin.write(b"in\n")
        await execution.stdin.close()
        await execution.stdin.close()
        with pytest.raises(InvalidStateError, match="closed"):
            await execution.stdin.write(b"x")
        assert (await execution.wait()).stdout == b"in\neof\n"


async def test_2_4_without_stdin_it_is_empty_and_cannot_be_written(box: LocalBox) -> None:
    execution = await box.exec("cat")
    with pytest.raises(InvalidStateError, match="stdin=True"):
        await execution.stdin.write(b"x")
    await execution.stdin.close()
    with in_time():
        assert (await execution.wait()).exit_code == 0


async def test_2_4_end_of_file_on_a_terminal_is_veof(box: LocalBox) -> None:
    execution = await box.exec(*sh("stty -echo; echo ready; cat; echo eof"), stdin=True, tty=True)
    out = bytearray()

    async def read() -> None:
        async for chunk in execution.stdout:
            out.extend(chunk)

    with in_time():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await until(lambda: b"ready" in out)
            await execution.stdin.write(b"line\nhalf")
            await execution.stdin.close()
        assert (await execution.wait()).exit_code == 0
    assert bytes(out).replace(b"\r\n", b"\n") == b"ready\nline\nhalfeof\n"


async def test_2_4_a_command_that_leaves_before_reading_reports_its_own_exit_code(box: LocalBox) -> None:
    with in_time():
        for code in (0, 17):
            result = await box.run(*sh(f"echo out; exit {code}"), input=bytes(4 * MIB))
            assert (result.exit_code, result.stdout) == (code, b"out\n")
        execution = await box.exec(*sh("exec <&-; read line < /dev/null; sleep 0.2; exit 18"), stdin=True)
        await execution.stdin.write(bytes(4 * MIB))  # its end is closed: thrown away, not an error
        await execution.stdin.close()
        assert (await execution.wait()).exit_code == 18


async def test_2_1_collecting_little_of_much_needs_little_memory(box: LocalBox) -> None:
    await box.run("true")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with in_time(30):
        result = await box.run(*sh("dd if=/dev/zero bs=1M count=300 2>/dev/null"), max_output=MIB)
    assert len(result.stdout) == MIB
    assert result.dropped == 299 * MIB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * KIB  # in KiB


async def _ended(box: LocalBox, exec_id: str) -> bool:
    return any(e.id == exec_id and e.exit_code is not None for e in await box.executions())


async def _quiet(box: LocalBox) -> bool:
    """Whether nothing has come for a while."""
    before = (await box.stats()).output_bytes
    await anyio.sleep(0.3)
    return before == (await box.stats()).output_bytes
