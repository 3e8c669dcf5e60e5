"""The way out of a box: through the gateway, beside slirp4netns and no way at all (the host's own loopback)."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers import slirp
from bench.peers.base import PeerError, call, end_process
from bench.rows import Goal, Quantity, Row, compare
from bench.samples import Outcome, alternate
from hutch.core.policy import GATEWAY_ADDRESS, HOST_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bench.samples import Subject
    from bench.stage import Stage
    from hutch.sdk.base import Box

_PROGRAM = "/netload"
_SLIRP, _DIRECT = "slirp4netns", "loopback, direct"
_MANY, _ONE_BY_ONE = 1000, 50


async def measure(stage: Stage) -> list[Row]:
    """Return the rows of the network: download, set-up of connections, many of them, and a slow neighbour."""
    program = stage.folder / "netload"
    call(["gcc", "-static", "-O2", "-o", str(program), str(Path(__file__).with_name("netload.c"))])
    with _server(program) as port, contextlib.ExitStack() as stack:
        box = await stage.runtime.create(stage.image, network=[f"{HOST_NAME}:{port}"], pids=None)
        await box.files.put(program, _PROGRAM)
        ways: dict[str, list[str]] = {_DIRECT: [str(program)]}
        missing: dict[str, Outcome] = {}
        try:
            ways[_SLIRP] = [*stack.enter_context(slirp.namespace()), str(program)]
        except PeerError as error:
            missing[_SLIRP] = Outcome(error=str(error))
        try:
            return await _rows(stage, box, port, ways, missing)
        finally:
            await box.remove(force=True)


async def _rows(
    stage: Stage, box: Box, port: int, ways: Mapping[str, list[str]], missing: dict[str, Outcome]
) -> list[Row]:
    size = stage.plan.stream_mib << 20

    def subjects(what: str, count: int) -> dict[str, Subject]:
        async def ours() -> float:
            return await _in_box(box, what, port, count)

        made: dict[str, Subject] = {"hutch": ours}
        for name, prefix in ways.items():
            address = slirp.HOST if name == _SLIRP else "127.0.0.1"
            made[name] = stage.measured(
                lambda argv=(*prefix, what, address, str(port), str(count)): _median(call(argv))  # type: ignore[misc]
            )
        return made

    async def compared(what: str, count: int, quantity: Quantity, goals: Mapping[str | None, Goal]) -> list[Row]:
        measured = subjects(what, count)
        outcomes = await alternate(
            measured, dict.fromkeys(measured, max(3, stage.plan.repeats)), budget=stage.plan.budget
        )
        if quantity.more_is_better:
            for outcome in outcomes.values():
                outcome.samples = [count / seconds for seconds in outcome.samples]
        ours = outcomes.pop("hutch")
        return compare(quantity, ours, outcomes | missing, goals)

    size_text = f"{stage.plan.stream_mib} MiB"
    rows = await compared(
        "download",
        size,
        Quantity("network", f"download of {size_text} through the gateway", "MB/s", 1e-6, more_is_better=True),
        {
            _DIRECT: Goal("at least half of direct", "ratio", at_least=0.5),
            _SLIRP: Goal("at least as fast", "ratio", at_least=1.0),
        },
    )
    rows += await compared(
        "connect",
        _ONE_BY_ONE,
        Quantity("network", "a connection, to the first byte of the peer", "ms", 1e3),
        {None: Goal("at most 2 ms", "value", at_most=2.0)},
    )
    rows += await compared(
        "many", _MANY, Quantity("network", f"{_MANY} connections open at once, all answered", "ms", 1e3), {}
    )
    stuck = await box.exec(_PROGRAM, "stuck", GATEWAY_ADDRESS, str(port))
    try:
        async for line in stuck.stdout:
            if line:
                break
        rows += await compared(
            "connect",
            _ONE_BY_ONE,
            Quantity("network", "a connection, while another's peer does not read", "ms", 1e3),
            {None: Goal("at most 2 ms", "value", at_most=2.0)},
        )
    finally:
        await stuck.kill()
        await stuck.wait()
    return rows


async def _in_box(box: Box, what: str, port: int, count: int) -> float:
    done = await box.run(_PROGRAM, what, GATEWAY_ADDRESS, str(port), str(count))
    if not done.ok:
        raise RuntimeError(f"netload {what} failed: {done.stderr.decode(errors='replace')}")
    return _median(done.text)


def _median(output: str) -> float:
    return statistics.median(map(float, output.split()))


@contextlib.contextmanager
def _server(program: Path) -> Iterator[int]:
    server = subprocess.Popen([program, "serve"], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        yield int(server.stdout.readline())
    finally:
        end_process(server)
