"""The network of one box, for the process that holds the runtime: its policy, and what it was refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from hutch.net import journal
from hutch.runtime.spec import build_network, check_network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hutch.runtime.runtime import LocalRuntime
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
            wanted = build_network(outbound, allow, before.ports)
            changed = msgspec.structs.replace(before, outbound=wanted.outbound, allow=wanted.allow)
            spec = msgspec.structs.replace(record.spec, network=changed)
            await self._runtime.lives.set_network(record, spec)
        return await self.get()

    async def limit(self, *, send_rate: int | None = None, receive_rate: int | None = None) -> NetPolicy:
        """Change how fast the box may send and receive. See `hutch.sdk.base.Network.limit`."""
        async with self._runtime.records.holding(self._box_id) as record:
            changed = msgspec.structs.replace(record.spec.network, send_rate=send_rate, receive_rate=receive_rate)
            check_network(changed)
            await self._runtime.lives.set_network(record, msgspec.structs.replace(record.spec, network=changed))
        return await self.get()

    async def log(self) -> list[Refusal]:
        """Return what the box was refused, oldest first; the newest few thousand entries."""
        self._runtime.store.box(self._box_id)
        return journal.read(self._runtime.home.box(self._box_id))
