"""The API process of a fleet: the server's application over the fleet's runtime, and the door for runners."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette

from hutch.fleet.guard import Guard
from hutch.fleet.wire import REGISTER, Registration
from hutch.sdk.remote_wire import loads
from hutch.server.answers import Call, route

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from hutch.fleet.runtime import FleetRuntime


def with_door(app: ASGIApp, fleet: FleetRuntime, join_token: str) -> ASGIApp:
    """The application, and beside it the place where runners that have the token report."""

    async def report(call: Call) -> object:
        await fleet.report(loads(call.body, Registration))
        return None

    reports = route("POST", REGISTER, report, "A report of a runner", takes=Registration)
    door = Guard(Starlette(routes=[reports]), join_token)

    async def choose(scope: Scope, receive: Receive, send: Send) -> None:
        await (door if scope.get("path") == REGISTER else app)(scope, receive, send)

    return choose
