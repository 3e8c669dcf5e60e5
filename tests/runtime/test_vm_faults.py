"""VMs whose emulator hangs or is gone at the wrong moment, and forks whose maker dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hutch.errors import UpstreamUnavailableError
from hutch.types import BoxState
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import in_time

if TYPE_CHECKING:
    from hutch.runtime.runtime import LocalRuntime

pytestmark = [pytest.mark.root, pytest.mark.anyio]


@pytest.fixture
def isolation() -> str:
    return "vm"


def emulator(keeper: int | None) -> int:
    """The keeper's only child."""
    return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text())


async def test_a_box_that_could_not_be_copied_can_be_ended(
    runtime: LocalRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its emulator neither stops for the copy nor goes on: both fail, and the box is not held by that."""
    monkeypatch.setattr("hutch.engine.vm.engine.SYNC_SECONDS", 0.5)
    box = await runtime.create(IMAGE)
    for ended in (BoxState.STOPPED, None):
        await box.start()
        os.kill(emulator((await box.info()).pid), signal.SIGSTOP)
        with in_time(28):
            with pytest.raises(UpstreamUnavailableError):
                await box.snapshots.create("never")
            await (box.stop(timeout=0.5) if ended else box.remove(force=True))
        if ended:
            assert (await box.info()).state is ended
