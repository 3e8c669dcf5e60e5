"""The network of boxes: whom they may reach, and tunnels to their ports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
from fastapi import APIRouter, Query, Request, Response

from hutch.core.policy import parse_rule
from hutch.errors import InvalidArgumentError, NetworkError, StoppedError
from hutch.server import views
from hutch.server.http import ERRORS, Segment, ServiceDep
from hutch.server.models import NetworkRule, TunnelGranted, TunnelList, TunnelView
from hutch.server.rules import check_network
from hutch.server.tunnels import Place
from hutch.types import BoxState, NetPolicy, Outbound, PublishedPort, Secret

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hutch.server.models import NetworkRequest, SecretRequest
    from hutch.server.service import Service

router = APIRouter(prefix="/v1/boxes/{box_id}/network", tags=["network"], responses=ERRORS)

Port = Annotated[int, Query(ge=1, le=65535, description="a TCP port of the box")]
_NONE = NetPolicy()


@router.put("/outbound", status_code=204)
async def update_outbound(box_id: Segment, body: NetworkRule, service: ServiceDep) -> Response:
    """Change whom a box may reach. It holds when the answer comes; connections that are not allowed any more end."""
    box = await service.box(box_id)
    wanted = _policy("", body)
    await _check(service, "", wanted)
    await box.network.update(wanted.outbound, allow=wanted.allow)
    return Response(status_code=204)


@router.put("/inbound", status_code=204)
async def update_inbound(box_id: Segment, body: NetworkRule, service: ServiceDep) -> Response:
    """Change who may use the tunnels of a box: `disabled`, those who asked for them; `enabled`, all who know where they
    are."""
    box = await service.box(box_id)
    _check_inbound("", body)
    service.marks.set_open(box.id, body.mode == "enabled")
    return Response(status_code=204)


@router.post("/tunnel")
async def open_tunnel(box_id: Segment, port: Port, request: Request, service: ServiceDep) -> TunnelGranted:
    """Make a tunnel to a port of a running box. It lasts until it is revoked, the box ends or the server does; asked
    for again it is the same."""
    box = await service.box_for_use(box_id)
    info = await box.info()
    if info.state is not BoxState.RUNNING:
        raise StoppedError(f"box {box.name or box.id} does not run, so nobody listens there; start it")
    return TunnelGranted(uri=service.tunnels.grant(info, port, _place(request)).uri)


@router.get("/tunnel")
async def list_tunnels(box_id: Segment, service: ServiceDep) -> TunnelList:
    """List the tunnels to a box, without their URIs."""
    box = await service.box(box_id)
    tunnels = [
        TunnelView(port=lease.port, created_at=views.moment(lease.at), connections=lease.connections)
        for lease in service.tunnels.of(box.id)
    ]
    return TunnelList(tunnels=tunnels)


@router.delete("/tunnel", status_code=204)
async def revoke_tunnel(box_id: Segment, port: Port, service: ServiceDep) -> Response:
    """End a tunnel and its connections. Nothing happens when there is none."""
    box = await service.box(box_id)
    service.tunnels.revoke(box.id, port)
    return Response(status_code=204)


async def asked(
    service: Service, network: NetworkRequest | None, requests: Sequence[SecretRequest]
) -> tuple[NetPolicy, tuple[Secret, ...]]:
    """What a new box gets for which this was asked for. Raises `InvalidArgumentError`, `UnsupportedError`,
    `NetworkError`, naming the field."""
    secrets = tuple(_secret(number, request) for number, request in enumerate(requests))
    field = "network."
    if network is None:
        policy = _NONE
    else:
        flat = network.mode is not None or network.allow_net is not None
        if flat and (network.outbound is not None or network.inbound is not None):
            raise InvalidArgumentError("network: give either mode and allow_net, or outbound and inbound, not both")
        if network.inbound is not None:
            _check_inbound("network.inbound.", network.inbound)
        if network.outbound is not None:
            field = "network.outbound."
            policy = _policy(field, network.outbound)
        elif network.mode == "disabled" or network.allow_net:
            mode = network.mode or "enabled"
            policy = _policy(field, NetworkRule(mode=mode, allow_net=network.allow_net or []))
        elif network.published_ports and network.mode is None and network.inbound is None:
            policy = _NONE  # ports were asked for, and nothing else
        elif not secrets and not await service.has_network():
            policy = _NONE  # the box says so
        else:
            policy = _without_a_wish(service)
    await _check(service, field, policy, secrets)
    return msgspec.structs.replace(policy, ports=_ports(network)), secrets


def is_open(network: NetworkRequest | None) -> bool:
    """Whether the tunnels of a new box are for all."""
    return network is not None and network.inbound is not None and network.inbound.mode == "enabled"


def placeholders(secrets: Iterable[Secret]) -> dict[str, str]:
    """The variables in which older clients have placeholders, beside those of the secrets' own names."""
    return {f"BOXLITE_SECRET_{secret.name}": secret.placeholder for secret in secrets}


def _ports(network: NetworkRequest | None) -> tuple[PublishedPort, ...]:
    """Published ports; the operator says at which address."""
    return tuple(
        PublishedPort(port=port.guest_port, host_port=port.host_port, host_ip="", protocol=port.protocol)
        for port in (network.published_ports if network is not None else ())
    )


def _without_a_wish(service: Service) -> NetPolicy:
    most = service.settings.network
    if not service.settings.network_by_default:
        return _NONE
    return NetPolicy(outbound=most.outbound, allow=most.allow if most.outbound is Outbound.ALLOW_LIST else ())


def _policy(field: str, rule: NetworkRule) -> NetPolicy:
    if rule.mode == "disabled":
        if rule.allow_net:
            raise InvalidArgumentError(f"{field}allow_net: it has no meaning with mode 'disabled'")
        return _NONE
    for number, text in enumerate(rule.allow_net):
        try:
            parse_rule(text)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{field}allow_net.{number}: {error}") from None
    kind = Outbound.ALLOW_LIST if rule.allow_net else Outbound.ENABLED
    return NetPolicy(outbound=kind, allow=tuple(rule.allow_net))


def _check_inbound(field: str, rule: NetworkRule) -> None:
    if rule.allow_net:
        raise InvalidArgumentError(f"{field}allow_net: there is no such list for what comes in")


async def _check(service: Service, field: str, policy: NetPolicy, secrets: Sequence[Secret] = ()) -> None:
    check_network(service.settings, f"{field}mode" if not policy.allow else f"{field}allow_net", policy, ())
    if secrets:
        check_network(service.settings, "secrets", _NONE, secrets)
    if (secrets or policy.outbound is not Outbound.DISABLED) and not await service.has_network():
        what = "secrets" if policy.outbound is Outbound.DISABLED else f"{field}mode"
        raise NetworkError(
            f"{what}: boxes cannot have a network here; on the machine of the boxes install nftables "
            "(apt-get install -y nftables), and see 'hutch doctor'"
        )


def _secret(number: int, request: SecretRequest) -> Secret:
    if not request.hosts:
        raise InvalidArgumentError(f"secrets.{number}.hosts: a secret without a host is of no use")
    return Secret(
        name=request.name,
        value=request.value,
        hosts=tuple(request.hosts),
        placeholder=request.placeholder or f"<BOXLITE_SECRET:{request.name}>",
    )


def _place(request: Request) -> Place:
    host = request.headers.get("host", "")
    name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
    server, client = request.scope.get("server"), request.client
    return Place(
        address=str(server[0]) if server else "127.0.0.1", host=name, peer=client.host if client else "127.0.0.1"
    )
