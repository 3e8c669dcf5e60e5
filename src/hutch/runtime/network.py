"""The network of one box, for the process that holds the runtime: its policy, and what it was refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hutch.net import journal
from hutch.runtime.bounds import check_rates
from hutch.runtime.spec import build_network, check_network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hutch.runtime.runtime import LocalRuntime
    from hutch.state import BoxRecord
    from hutch.types import NetPolicy, Outbound, Refusal


class BoxNetwork:
    """Implements `hutch.sdk.base.Network`."""

    def __init__(self, runtime: LocalRuntime, box_id: str) -> None:
        self._runtime = runtime
        self._box_id = box_id

    async def get(self) -> NetPolicy:
        """Return the policy as it is; of a running box with the ports that were chosen."""
        return (await self._runtime.records.info(self._box_id)).network

    async def update(self, outbound: Outbound | str | None = None, *, allow: Sequence[str] | None = None) -> NetPolicy:
        """Change whom the box may reach. See `hutch.sdk.base.Network.update`."""
        async with self._runtime.records.holding(self._box_id) as record:
            before = record.spec.network
            wanted = build_network(outbound, allow, ())
            changed = msgspec.structs.replace(before, outbound=wanted.outbound, allow=wanted.allow)
            await self._change(record, changed)
        return await self.get()

    async def limit(self, *, send_rate: int | None = None, receive_rate: int | None = None) -> NetPolicy:
        """Change how fast the box may send and receive. See `hutch.sdk.base.Network.limit`."""
        async with self._runtime.records.holding(self._box_id) as record:
            changed = msgspec.structs.replace(record.spec.network, send_rate=send_rate, receive_rate=receive_rate)
            check_network(changed)
            check_rates(self._runtime.bounds, changed)
            await self._change(record, changed)
        return await self.get()

    async def log(self) -> list[Refusal]:
        """Return what the box was refused, oldest first; the newest few thousand entries."""
        self._runtime.store.box(self._box_id)
        return journal.read(self._runtime.home.box(self._box_id))

    async def _change(self, record: BoxRecord, changed: NetPolicy) -> None:
        record = msgspec.structs.replace(record, bounds=self._runtime.bounds or record.bounds)
        await self._runtime.lives.set_network(record, msgspec.structs.replace(record.spec, network=changed))
