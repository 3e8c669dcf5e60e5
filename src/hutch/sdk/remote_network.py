"""The network of a box behind a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hutch.runtime.spec import build_network
from hutch.sdk.remote_wire import NetworkBody, RatesBody
from hutch.types import BoxInfo, NetPolicy, Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hutch.sdk.remote_http import Http
    from hutch.types import Outbound


class RemoteNetwork:
    """The network of one box. Implements `hutch.sdk.base.Network`."""

    def __init__(self, http: Http, box_path: str) -> None:
        self._http = http
        self._box = box_path

    async def get(self) -> NetPolicy:
        """Return the policy as it is."""
        return (await self._http.get(self._box, BoxInfo)).network

    async def update(self, outbound: Outbound | str | None = None, *, allow: Sequence[str] | None = None) -> NetPolicy:
        """Change whom the box may reach. See `hutch.sdk.base.Network.update`."""
        wanted = build_network(outbound, allow, ())
        body = NetworkBody(outbound=wanted.outbound, allow=wanted.allow)
        return await self._http.call("POST", f"{self._box}/network", NetPolicy, body)

    async def limit(self, *, send_rate: int | None = None, receive_rate: int | None = None) -> NetPolicy:
        """Change how fast the box may send and receive. See `hutch.sdk.base.Network.limit`."""
        body = RatesBody(send_rate=send_rate, receive_rate=receive_rate)
        return await self._http.call("POST", f"{self._box}/network/rates", NetPolicy, body)

    async def log(self) -> list[Refusal]:
        """Return what the box was refused, oldest first."""
        return await self._http.get(f"{self._box}/network/log", list[Refusal])
