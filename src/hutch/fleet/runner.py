"""A runner: holds boxes, serves them to the API and to nobody else, and reports to it."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from types import NoneType
from typing import TYPE_CHECKING

import anyio
from starlette.applications import Starlette

from hutch.errors import HutchError, MetadataError
from hutch.fleet.guard import Guard
from hutch.fleet.wire import REGISTER, Registration
from hutch.host.netns import nft
from hutch.image.logins import Entry
from hutch.runtime.home import new_id
from hutch.sdk.remote_http import Http
from hutch.sdk.remote_wire import loads
from hutch.server import relay
from hutch.server.answers import Call, route
from hutch.server.rules import Rules
from hutch.server.transit import Transit
from hutch.types import BoxState

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.types import ASGIApp

    from hutch.runtime.runtime import LocalRuntime
    from hutch.types import BoxInfo

log = logging.getLogger("hutch.runner")

BEAT_SECONDS = 2.0
_FIRST_PAUSE = 0.2


def make_app(runtime: LocalRuntime) -> ASGIApp:
    """The runner's application: ``/v1/x`` and the relay, for whoever has its token."""
    _, token = identity(runtime.home.root)
    archives = runtime.home.root / "transit"
    archives.mkdir(mode=0o700, exist_ok=True)
    transit = Transit(archives)
    transit.clear()
    journal = Journal(runtime.home.root / "journal", transit)

    async def set_logins(call: Call) -> object:
        await runtime.images.set_logins(loads(call.body, list[Entry]))
        return None

    own = route("PUT", "/v1/x/logins", set_logins, "Replace the logins", takes=list[Entry], gives=NoneType)
    return Guard(Starlette(routes=[own, *relay.routes(runtime, journal)]), token)


class Journal(Rules):
    """One line for each box that was made here, as JSON: the proof of where a box is."""

    def __init__(self, path: Path, transit: Transit) -> None:
        super().__init__(transit)
        self._path = path

    def made(self, info: BoxInfo) -> None:
        """Note a box."""
        line = json.dumps({"time": time.time(), "event": "created", "box": info.id, "name": info.name}) + "\n"
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)


def identity(home: Path) -> tuple[str, str]:
    """The runner's name, and the token that opens it to the API: chosen once for its home, so that an API that knew
    it before it was restarted knows it still."""
    path = home / "runner"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        pass
    else:
        with open(fd, "w") as file:
            file.write(f"{new_id()} {secrets.token_urlsafe(32)}")
    words = path.read_text().split()
    if len(words) != 2:
        raise MetadataError(f"{path} does not hold the name and the token of a runner; remove it to join anew")
    return words[0], words[1]


async def report(runtime: LocalRuntime, api: str, join_token: str, url: str) -> None:
    """Tell the API again and again where this runner is and how much it does."""
    name, token = identity(runtime.home.root)
    http = Http(api, join_token)
    pause, warned = _FIRST_PAUSE, False
    try:
        while True:
            running = sum(info.state is BoxState.RUNNING for info in await runtime.list())
            body = Registration(
                runner=name,
                url=url,
                token=token,
                running=running,
                network=nft() is not None,
                publishes=bool(runtime.bounds and runtime.bounds.publish_address),
            )
            try:
                await http.call("POST", REGISTER, object, body)
                pause, warned = BEAT_SECONDS, False
            except HutchError as error:
                if not warned:
                    log.warning("the API at %s does not take our report: %s", api, error)
                pause, warned = min(2 * pause, BEAT_SECONDS), True
            await anyio.sleep(pause)
    finally:
        with anyio.CancelScope(shield=True):
            await http.close()
