"""Arguments of every wrong kind are refused by name, and leave nothing behind that spoils the home for others."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from hutch.errors import HutchError, InvalidArgumentError
from hutch.runtime.runtime import LocalRuntime
from hutch.types import Mount
from tests.runtime.conftest import IMAGE
from tests.runtime.helpers import in_time

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from hutch.runtime.box import LocalBox

pytestmark = [pytest.mark.root, pytest.mark.anyio]

ODD: tuple[Any, ...] = (
    5,
    -1,
    True,
    None,
    1.5,
    math.nan,
    math.inf,
    b"bytes",
    "",
    "a\0b",
    "\udcff",
    "\ud800",
    "x" * (1 << 20),
    "..",
    [],
    ["a", 5],
    {},
    {5: 5},
    {"a": 5},
    {"a": "b\0"},
    object(),
    2**70,
    -(2**70),
)
MESSAGE_LIMIT = 3000


async def is_typed(what: str, call: Callable[[], Awaitable[object]]) -> None:
    """The call succeeds, or fails with an error of ours that is not longer than anyone can read."""
    try:
        with in_time():
            await call()
    except HutchError as error:
        assert len(str(error)) < MESSAGE_LIMIT, what
    except Exception as error:
        raise AssertionError(f"{what}: {error!r:.300}") from error


@pytest.mark.parametrize(
    "parameter",
    [
        *(
            "image",
            "name",
            "command",
            "entrypoint",
            "env",
            "workdir",
            "user",
            "labels",
            "cpus",
            "memory_mib",
            "disk_gb",
        ),
        *("pids", "mounts", "isolation", "auto_remove", "auto_resume", "detach", "hostname", "tty", "open_stdin"),
        *("stop_signal", "platform", "pull", "progress"),
    ],
)
async def test_create_takes_no_nonsense(runtime: LocalRuntime, parameter: str) -> None:
    create: Any = runtime.create
    for value in ODD:
        arguments = {"image": IMAGE, "pull": "never"} | {parameter: value}
        await is_typed(f"{parameter}={value!r:.60}", partial(create, **arguments))
        await runtime.list()  # what was recorded can be read


async def test_a_mount_of_a_wrong_kind_is_refused(runtime: LocalRuntime) -> None:
    make: Any = Mount
    odd: list[Any] = [
        5,
        "x",
        make(target=5, source="/tmp"),
        make(target="/a", source=b"/"),
        make(target="/a", volume=5),
    ]
    for mount in odd:
        with pytest.raises(InvalidArgumentError):
            await runtime.create(IMAGE, mounts=[mount])


async def test_a_box_with_a_bad_record_is_never_made(home: Path) -> None:
    async with LocalRuntime(home) as runtime:
        with pytest.raises(InvalidArgumentError, match="user"):
            await runtime.create(IMAGE, user=5)  # type: ignore[arg-type]
    async with LocalRuntime(home) as runtime:
        assert await runtime.list() == []


async def test_lookups_take_no_nonsense(runtime: LocalRuntime, tmp_path: Path) -> None:
    for value in ODD:
        calls: dict[str, Callable[..., Awaitable[object]]] = {
            "get": runtime.get,
            "remove": runtime.remove,
            "images.get": runtime.images.get,
            "images.remove": runtime.images.remove,
            "images.load": runtime.images.load,
            "volumes.create": runtime.volumes.create,
            "volumes.get": runtime.volumes.get,
            "volumes.remove": runtime.volumes.remove,
            "import_box": runtime.import_box,
        }
        for what, call in calls.items():
            await is_typed(f"{what}({value!r:.60})", partial(call, value))
        await is_typed(f"list({value!r:.60})", partial(runtime.list, labels=value))


async def test_commands_take_no_nonsense(box: LocalBox) -> None:
    run: Any = box.run
    for value in ODD:
        await is_typed(f"argv {value!r:.60}", partial(box.run, "echo", value))
        for option in ("input", "env", "cwd", "user", "timeout", "kill_after", "linger", "max_output"):
            await is_typed(f"{option}={value!r:.60}", partial(run, "cat", **{option: value}))
        for option in ("rows", "cols", "stdout", "stderr", "on_exit"):
            if value is None:
                continue
            with pytest.raises(InvalidArgumentError):
                await is_refused(box, option, value)


async def is_refused(box: LocalBox, option: str, value: object) -> None:
    start: Any = box.exec
    execution = await start("true", **{option: value})
    await execution.close()
    if option in ("rows", "cols") and value == 5:
        raise InvalidArgumentError("a size that is fine")


async def test_running_commands_take_no_nonsense(box: LocalBox) -> None:
    execution = await box.exec("sleep", "60", stdin=True, tty=True)
    for value in ODD:
        if value in (5, True, None):
            continue
        calls: dict[str, Callable[..., Awaitable[object]]] = {
            "signal": partial(execution.signal, value),
            "resize": partial(execution.resize, value, value),
            "attach": partial(box.attach, value),
            "after": partial(box.attach, execution.id, after=value),
            "stop": partial(box.kill, value),
        }
        for what, call in calls.items():
            with pytest.raises(HutchError):
                await is_typed_call(f"{what}({value!r:.60})", call)
        if not isinstance(value, (bytes, str)):
            with pytest.raises(InvalidArgumentError):
                await execution.stdin.write(value)
    await execution.kill()
    assert (await execution.wait()).exit_code == -9


async def is_typed_call(what: str, call: Callable[[], Awaitable[object]]) -> None:
    try:
        await call()
    except HutchError as error:
        assert len(str(error)) < MESSAGE_LIMIT, what
        raise


async def test_files_take_no_nonsense(box: LocalBox, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    for value in ODD:
        calls: dict[str, Callable[..., Awaitable[object]]] = {
            "read": partial(box.files.read, value),
            "list": partial(box.files.list, value),
            "stat": partial(box.files.stat, value),
            "max_bytes": partial(box.files.read, "/etc/passwd", max_bytes=value),
            "write": partial(box.files.write, value, b"x"),
            "data": partial(box.files.write, "/tmp/a", value),
            "mode": partial(box.files.write, "/tmp/a", b"", mode=value),
            "put to": partial(box.files.put, tmp_path / "a", value),
        }
        for what, call in calls.items():
            await is_typed(f"{what} {value!r:.60}", call)
    paths: tuple[Any, ...] = (5, None, "a\0b", "x" * (1 << 20), b"x", {})
    for value in paths:
        with pytest.raises(HutchError):
            await box.files.put(value, "/tmp/")
        with pytest.raises(HutchError):
            await box.files.get("/etc/passwd", value)
