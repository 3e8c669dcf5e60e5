"""What runners tell the API."""

from __future__ import annotations

from hutch.sdk.remote_wire import Body

REGISTER = "/v1/x/runners"


class Registration(Body, frozen=True, kw_only=True):
    """``POST /v1/x/runners``, also as a heartbeat. ``url`` and ``token`` are the API's way to the runner; ``running``
    is the number of its running boxes; ``network``: whether boxes can have a network there,
    ``publishes``: whether they can have ports of the machine."""

    runner: str
    url: str
    token: str
    running: int
    network: bool = False
    publishes: bool = False
