"""What a server adds to the requests that our own SDK makes under ``/v1/x`` and over the relay."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

import msgspec

from hutch.core.idle import Policy
from hutch.core.policy import covers, is_special, parse_rule
from hutch.core.secrets import host_rules
from hutch.errors import HutchError, InvalidArgumentError, UnsupportedError
from hutch.server import policy
from hutch.types import Isolation, Outbound

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Receive, Scope, Send

    from hutch.sdk.remote_wire import ExecBody
    from hutch.server.service import Service
    from hutch.server.settings import ServerSettings
    from hutch.server.transit import Transit
    from hutch.types import BoxInfo, BoxSpec, NetPolicy, Secret

_EXEC = re.compile(r"/v1/x/boxes/([^/]+)/exec\Z")
_RELAY = re.compile(r"/v1/boxes/([^/]+)/executions/[^/]+/relay\Z")
_REQUESTED = re.compile(r"/v1/x/boxes/([^/]+)/(?:start|stop|kill)\Z")


class Rules:
    """Nothing at all: a runner serves an API, which has rules of its own. ``transit`` is for archives on their way."""

    def __init__(self, transit: Transit) -> None:
        self.transit = transit

    def admit(self, spec: BoxSpec) -> BoxSpec:
        """What is made when a client asks for this. Raises what it may not have."""
        return spec

    def made(self, info: BoxInfo) -> None:
        """A box was made for a client; its answer comes after this."""

    def shown(self, info: BoxInfo) -> BoxInfo:
        """What clients see of a box."""
        return info

    def reaching(self, network: NetPolicy) -> None:
        """A box is to have this network. Raises when it may not."""

    def starting(self, body: ExecBody) -> ExecBody:
        """What is started when a client asks for this. Raises what it may not have."""
        return body

    def used(self, box_id: str) -> None:
        """A client has sent something to a command in the box."""

    def commanded(self, box_id: str) -> None:
        """A client has a command started in the box, by the connection of an earlier one."""


class ClientRules(Rules):
    """The policy of the operator, and the activity of boxes."""

    def __init__(self, service: Service) -> None:
        super().__init__(service.transit)
        self._service = service

    def admit(self, spec: BoxSpec) -> BoxSpec:
        policy.check_labels(spec.labels)
        settings = self._service.settings
        check_network(settings, "network", spec.network, spec.secrets)
        rules = Policy(auto_stop=settings.auto_stop, auto_delete=settings.auto_delete)
        return msgspec.structs.replace(
            spec,
            labels={**spec.labels, **policy.to_labels(rules)},
            isolation=isolation(settings, None if spec.isolation is Isolation.AUTO else spec.isolation),
        )

    def made(self, info: BoxInfo) -> None:
        self._service.counters.created += 1
        self._service.touch(info.id)

    def shown(self, info: BoxInfo) -> BoxInfo:
        return msgspec.structs.replace(info, labels=policy.public(info.labels))

    def reaching(self, network: NetPolicy) -> None:
        check_network(self._service.settings, "network", network)

    def starting(self, body: ExecBody) -> ExecBody:
        if body.file_op is not None:
            return body
        return msgspec.structs.replace(body, timeout=time_limit(self._service.settings, "timeout", body.timeout))

    def used(self, box_id: str) -> None:
        self._service.touch(box_id)

    def commanded(self, box_id: str) -> None:
        self._service.counters.commands += 1
        self._service.touch(box_id)


def isolation(settings: ServerSettings, asked: str | None) -> Isolation:
    """How a box is kept apart for which this was asked for. Raises `UnsupportedError`."""
    chosen = asked or settings.isolations[0]
    if chosen not in settings.isolations:
        raise UnsupportedError(f"isolation: this server offers {', '.join(settings.isolations)}, not {chosen!r}")
    return Isolation(chosen)


def check_network(settings: ServerSettings, field: str, network: NetPolicy, secrets: Iterable[Secret] = ()) -> None:
    """Raise `UnsupportedError` for more than the operator lets boxes reach, naming the field."""
    most = settings.network
    if network.outbound is Outbound.ENABLED and most.outbound is not Outbound.ENABLED:
        raise UnsupportedError(f"{field}: this server gives no box all of the network{_instead(most)}")
    listed = [parse_rule(text) for text in most.allow]
    wanted = [(text, parse_rule(text)) for text in network.allow]
    wanted += [(text, parse_rule(text)) for secret in secrets for text in host_rules(secret)]
    if wanted and most.outbound is Outbound.DISABLED:
        raise UnsupportedError(f"{field}: this server gives boxes no network")
    for text, rule in wanted:
        free = most.outbound is Outbound.ENABLED and not is_special(rule)
        if not (free or any(covers(each, rule) for each in listed)):
            raise UnsupportedError(f"{field}: this server lets no box reach {text!r:.200}{_instead(most)}")


def _instead(most: NetPolicy) -> str:
    return f"; at most {', '.join(most.allow)}"[:500] if most.outbound is Outbound.ALLOW_LIST else ""


def time_limit(settings: ServerSettings, field: str, asked: float | None) -> float | None:
    """How long a command may take. Raises `InvalidArgumentError` naming the field."""
    timeout = settings.exec_timeout if asked is None else asked
    most = settings.max_exec_timeout
    if most is not None and asked is not None and (not asked or asked > most):
        raise InvalidArgumentError(f"{field}: {asked:g} is not within the operator's limit of {most:g} seconds")
    return timeout or most


class Activity:
    """ASGI middleware. The use of a box by our own client starts one that only the idle policy has stopped, and a
    start or stop that it asks for is none of the idle policy."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        with contextlib.suppress(HutchError):  # it will be told by what was asked for
            if scope["type"] == "http" and (match := _EXEC.match(path)) is not None:
                self._service.counters.commands += 1
                await self._service.box_for_use(match[1])
            elif scope["type"] == "http" and (match := _REQUESTED.match(path)) is not None:
                self._service.settle((await self._service.box(match[1])).id)
            elif scope["type"] == "websocket" and (match := _RELAY.match(path)) is not None:
                await self._service.box_for_use(match[1], active=False)
        await self._app(scope, receive, send)
