"""The sync SDK: generated from the protocols, and working."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

import hutch.sync
from hutch.errors import DeadlineError, ExecError, NotFoundError, RuntimeClosedError
from tests import rootfs

ROOT = Path(__file__).parent.parent.parent
IMAGE = "busybox:test"


def test_the_generated_file_is_not_stale() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/gen_sync.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.root
def test_everything_without_async(tmp_path: Path) -> None:
    tree = rootfs.build(tmp_path / "rootfs")
    with hutch.sync.local(tmp_path / "home") as runtime:
        runtime.images.load(tree, reference=IMAGE)
        with runtime.create(IMAGE, name="one", auto_remove=True) as box:
            assert box.run("echo", "hello").text == "hello\n"

            execution = box.exec("sh", "-c", "for i in 1 2 3; do echo $i; done; exit 4")
            assert b"".join(execution.stdout) == b"1\n2\n3\n"
            assert execution.wait().exit_code == 4

            sink = io.BytesIO()
            execution = box.exec("cat", stdin=True, stdout=sink)
            execution.stdin.write(b"bytes")
            with pytest.raises(DeadlineError):
                execution.wait(timeout=0.05)
            execution.stdin.close()
            assert execution.wait().ok
            assert sink.getvalue() == b"bytes"

            with pytest.raises(ExecError, match="no-such-command"):
                box.run("no-such-command")

            box.files.write("/data", "text")
            assert box.files.read("/data") == b"text"
            box.snapshots.create("first")
            assert [snapshot.name for snapshot in box.snapshots.list()] == ["first"]
            twin = box.clone("twin")
            assert twin.run("cat", "/data").stdout == b"text"
            twin.remove(force=True)
        assert runtime.list() == []
        with pytest.raises(NotFoundError):
            runtime.get("one")

        job = runtime.create(IMAGE, command=["sh", "-c", "echo out; exit 2"])
        job.start()
        assert job.wait() == 2
        assert [entry.data for entry in job.logs()] == [b"out\n"]
        job.remove()
        kept = runtime.create(IMAGE)
    with pytest.raises((RuntimeClosedError, RuntimeError)):
        kept.run("true")
