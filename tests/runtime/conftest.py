"""Fixtures: a runtime over a fresh home that shares one image, and a box in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.runtime.runtime import LocalRuntime
from tests import rootfs
from tests.runtime.helpers import RuntimeOf

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hutch.runtime.box import LocalBox

IMAGE = "busybox:test"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image store that holds the test image."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    home = tmp_path_factory.mktemp("seed") / "home"
    tree = rootfs.build(tmp_path_factory.mktemp("image") / "rootfs")

    async def load() -> None:
        async with LocalRuntime(home) as runtime:
            await runtime.images.load(tree, reference=IMAGE)

    anyio.run(load)
    return home / "images"


@pytest.fixture
def home(tmp_path: Path, images: Path, vm_store: Path) -> Path:
    """A fresh home that shares the images, and what VMs are made from."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "images").symlink_to(images)
    (home / "vm").symlink_to(vm_store)
    return home


# A cross-section, so that the suite stays quick; HUTCH_TEST_ISOLATION=vm runs all tests over VMs.
ON_VMS_TOO = {
    "test_1_1_parallel_commands_get_their_own_output_whole",
    "test_1_5_close_breaks_a_drain_and_tells_the_exit_code",
    "test_1_7_a_full_pipe_at_the_exit_is_delivered_to_a_slow_sink",
    "test_2_1_a_slow_sink_blocks_its_own_stream_and_nothing_else",
    "test_2_4_input_arrives_whole_and_in_order",
    "test_3_4_killing_the_host_process_in_mid_stream_loses_nothing",
    "test_4_2_timeout_terminates_the_whole_group_and_delivers_what_was_written",
    "test_4_5_several_processes_race_for_the_first_exec",
    "test_4_6_hangup_and_interrupt_reach_the_terminal",
    "test_a_box_that_was_killed_from_outside_is_marked_with_the_reason",
    "test_a_clone_has_the_files_and_goes_its_own_way",
    "test_a_paused_box_stands_still_until_it_is_resumed",
    "test_export_and_import",
    "test_host_folders_read_only_and_writable",
    "test_main_command_logs_and_exit_code",
    "test_snapshot_and_restore",
    "test_volumes_are_shared_and_outlive_boxes",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the cross-section over both kinds of boxes."""
    chosen = metafunc.function.__name__ in ON_VMS_TOO and not metafunc.module.__name__.endswith("test_disk_limit")
    if chosen and "isolation" in metafunc.fixturenames:
        metafunc.parametrize("isolation", ["container", "vm"])


@pytest.fixture
def isolation() -> str:
    """What the boxes are isolated by: containers, or what HUTCH_TEST_ISOLATION says."""
    return os.environ.get("HUTCH_TEST_ISOLATION", "container")


@pytest.fixture
async def runtime(home: Path, isolation: str) -> AsyncIterator[LocalRuntime]:
    """A runtime over the fresh home. Nothing of its boxes is left afterwards."""
    runtime = RuntimeOf(home)
    runtime.isolation = isolation
    async with runtime:
        yield runtime
        for info in await runtime.list():
            await runtime.remove(info.id, force=True)


@pytest.fixture
async def box(runtime: LocalRuntime) -> LocalBox:
    """A running box."""
    box = await runtime.create(IMAGE)
    await box.start()
    return box
