"""stats: what running boxes use."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import anyio
import msgspec

from hutch.cli import output
from hutch.errors import InvalidStateError, NotFoundError
from hutch.types import BoxState

if TYPE_CHECKING:
    from hutch.cli.parser import Arguments
    from hutch.cli.session import Session
    from hutch.sdk.base import Runtime
    from hutch.types import BoxStats

# Seconds between the two looks at a box that its CPU share is computed from.
_SAMPLE, _WATCH = 0.2, 1.0
_HEADER = ("ID", "NAME", "CPU %", "MEMORY", "LIMIT", "PIDS", "DISK", "NET OUT", "NET IN", "COMMANDS", "UPTIME")
_CLEAR_SCREEN = "\x1b[H\x1b[2J"


class _Sample(NamedTuple):
    id: str
    name: str
    when: float
    usage: BoxStats


async def stats(session: Session, args: Arguments) -> int:
    """Show what boxes use, once or every second."""
    async with session.runtime() as runtime:
        before = await _measure(runtime, args.box)
        while True:
            await anyio.sleep(_WATCH if args.watch else _SAMPLE)
            now = await _measure(runtime, args.box)
            if args.json:
                output.json_value(
                    [{"id": s.id, "name": s.name, **msgspec.structs.asdict(s.usage)} for s in now.values()]
                )
            else:
                if args.watch and sys.stdout.isatty():
                    sys.stdout.write(_CLEAR_SCREEN)
                output.table(_HEADER, (_row(sample, before.get(sample.id)) for sample in now.values()))
            sys.stdout.flush()
            if not args.watch:
                return 0
            before = now


async def _measure(runtime: Runtime, names: list[str]) -> dict[str, _Sample]:
    ids = names or [box.id for box in await runtime.list() if box.state is BoxState.RUNNING]
    samples = {}
    for name in ids:
        try:
            box = await runtime.get(name)
            usage = await box.stats()
        except (InvalidStateError, NotFoundError):
            if names:
                raise
            continue  # it ended since the list was made
        samples[box.id] = _Sample(box.id, box.name or "", anyio.current_time(), usage)
    return samples


def _row(sample: _Sample, before: _Sample | None) -> tuple[str, ...]:
    usage = sample.usage
    return (
        sample.id[: output.SHORT_ID],
        sample.name,
        _share(sample, before),
        output.size(usage.memory_bytes),
        output.size(usage.memory_limit_bytes),
        "-" if usage.pids is None else str(usage.pids),
        output.size(usage.disk_bytes),
        output.size(usage.network_sent_bytes),
        output.size(usage.network_received_bytes),
        str(usage.commands_started),
        f"{usage.uptime_seconds:.0f}s",
    )


def _share(sample: _Sample, before: _Sample | None) -> str:
    if before is None or sample.usage.cpu_seconds is None or before.usage.cpu_seconds is None:
        return "-"
    used = sample.usage.cpu_seconds - before.usage.cpu_seconds
    return f"{max(used, 0.0) / (sample.when - before.when) * 100:.0f}"
