"""The host's half of a start, beside a box that was taken over before it is complete: a fork's guest is another's."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.engine.launcher import Launch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.anyio

TAKEN = r"""
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void tell(const char *text, int fd)
{
    union {
        struct cmsghdr header;
        char bytes[CMSG_SPACE(sizeof fd)];
    } space = {.header = {CMSG_LEN(sizeof fd), SOL_SOCKET, SCM_RIGHTS}};
    struct iovec part = {(void *)text, strlen(text)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};

    message.msg_control = &space;
    message.msg_controllen = sizeof space;
    memcpy(CMSG_DATA(&space.header), &fd, sizeof fd);
    sendmsg(0, &message, 0);
}

int main(void)
{
    char text[32];
    snprintf(text, sizeof text, "P%d", getpid());
    tell(text, 1);
    snprintf(text, sizeof text, "P%d", getppid());
    for (int i = 0; i < 100; i++)
        tell(text, 1);
    tell("R", 1);
    pause();
}
"""


async def test_another_process_is_not_taken_for_the_boxs(tmp_path: Path) -> None:
    """Or it would be ended with the box. Nor are descriptors kept that nobody wanted."""
    program = tmp_path / "taken"
    subprocess.run(["gcc", "-x", "c", "-o", program, "-"], input=TAKEN, text=True, check=True)
    launch = Launch(program, "vm")
    try:
        with anyio.fail_after(10):
            before = len(os.listdir("/proc/self/fd"))
            process = await launch.until(b"R")
            assert process.pid != os.getpid()
            assert len(os.listdir("/proc/self/fd")) <= before + 1
    finally:
        assert launch._pidfd is not None
        os.close(launch._pidfd)
        launch._pidfd = None  # it is none
        await launch.close()
