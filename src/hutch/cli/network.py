"""net show, set, log; port-forward."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import anyio

from hutch.cli import options, output
from hutch.cli.parser import UsageError
from hutch.types import NetPolicy, Outbound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hutch.cli.parser import Arguments
    from hutch.cli.session import Session


async def show(session: Session, args: Arguments) -> int:
    """Print the policy of a box."""
    async with session.runtime() as runtime:
        policy = await (await runtime.get(args.box)).network.get()
    if args.json:
        output.json_value(policy)
        return 0
    output.line(f"outbound: {policy.outbound}")
    for rule in policy.allow:
        output.line(f"allow: {rule}")
    for what, rate in (("send rate", policy.send_rate), ("receive rate", policy.receive_rate)):
        if rate is not None:
            output.line(f"{what}: {output.size(rate)}/s")
    for port in policy.ports:
        host = f"[{port.host_ip}]" if ":" in port.host_ip else port.host_ip
        output.line(f"port: {host}:{port.host_port or 'any'} -> {port.port}{'' if port.protocol == 'tcp' else '/udp'}")
    return 0


async def set_(session: Session, args: Arguments) -> int:
    """Change the policy of a box."""
    peers = args.network is not None or bool(args.allow_net)
    rates = (args.send_rate, args.receive_rate)
    if not peers and rates == (None, None):
        raise UsageError("nothing to change: give --network, --allow-net, --send-rate or --receive-rate")
    policy = network_policy(args.network, args.allow_net)
    async with session.runtime() as runtime:
        network = (await runtime.get(args.box)).network
        if rates != (None, None):
            before = await network.get()
            send, receive = (
                old if new is None else new or None
                for new, old in zip(rates, (before.send_rate, before.receive_rate), strict=True)
            )
            await network.limit(send_rate=send, receive_rate=receive)
        if peers:
            await network.update(policy.outbound, allow=policy.allow)
    return 0


async def log(session: Session, args: Arguments) -> int:
    """Print the refusals of a box."""
    async with session.runtime() as runtime:
        refusals = await (await runtime.get(args.box)).network.log()
    if args.json:
        output.json_value(refusals)
        return 0
    for refusal in refusals:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(refusal.time))
        name = f" ({refusal.name})" if refusal.name else ""
        output.line(f"{when} {refusal.protocol} {refusal.peer}{name}: {refusal.reason}")
    return 0


async def port_forward(session: Session, args: Arguments) -> int:
    """Forward a port until a signal comes."""
    try:
        wanted = options.publish(args.port)
    except ValueError as error:
        raise UsageError(f"PORT: {error}") from None
    if wanted.protocol != "tcp":
        raise UsageError("PORT: only TCP ports can be forwarded; publish a UDP port with 'hutch run -p'")
    async with session.runtime() as runtime:
        box = await runtime.get(args.box)
        async with await box.ports.forward(wanted.port, host_port=wanted.host_port, host_ip=wanted.host_ip) as forward:
            output.line(f"{forward.host_ip}:{forward.host_port} -> {wanted.port}")
            sys.stdout.flush()
            await anyio.sleep_forever()
    return 0


def network_policy(mode: str | None, rules: Sequence[str]) -> NetPolicy:
    """What ``--network`` and ``--allow-net`` mean together. Raises `UsageError`."""
    if mode == Outbound.DISABLED and rules:
        raise UsageError("--allow-net: has no meaning with --network disabled")
    if mode is None:
        return NetPolicy(outbound=Outbound.ALLOW_LIST if rules else Outbound.DISABLED, allow=tuple(rules))
    return NetPolicy(outbound=Outbound(mode), allow=tuple(rules))
