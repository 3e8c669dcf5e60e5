"""What the operator of a server gives boxes of the machine's network (`hutch.types.NetBounds`): how fast they may be,
and which ports of the host they may have.

A box keeps what was asked for, and beside it the bounds of the server that made, started or changed it last: what holds
is the lesser of the two. A published port without an address is one that the operator gives; one with an address was
published on this machine, by its owner, and is left alone.
"""

from __future__ import annotations

import errno
import ipaddress
import secrets
from typing import TYPE_CHECKING

import msgspec

from hutch.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    NetworkError,
    ResourceExhaustedError,
    UnsupportedError,
)
from hutch.runtime.checks import check_whole, quoted
from hutch.runtime.ports import listen_at
from hutch.runtime.spec import MAX_RATE, MIN_RATE
from hutch.types import NetBounds, PublishedPort

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

    from hutch.state import BoxRecord
    from hutch.types import BoxSpec, NetPolicy

LOOPBACK = "127.0.0.1"
_FIRST_PORT = 1024
NOT_PUBLISHED = (
    "ports: this server publishes no ports of boxes; its operator has to allow that, with --publish-address ('hutch "
    "serve' or 'hutch serve runner'). A tunnel (box.ports, hutch port-forward) needs no such port"
)


def check_bounds(most: NetBounds) -> None:
    """Raise `InvalidArgumentError` for what cannot be."""
    for what, rate in (("send", most.send_rate), ("receive", most.receive_rate)):
        if rate is not None:
            check_whole(f"the highest {what} rate (bytes per second)", rate, MIN_RATE, MAX_RATE)
    if most.publish_address:
        try:
            ipaddress.ip_address(most.publish_address)
        except ValueError:
            raise InvalidArgumentError(
                f"{quoted(most.publish_address)}, at which ports are to be published, is not an address"
            ) from None
    first, last = most.publish_ports
    if not _FIRST_PORT <= first <= last <= 65535:
        raise InvalidArgumentError(
            f"ports {first}-{last} cannot be given to boxes: a range lies within {_FIRST_PORT}-65535"
        )
    check_whole("the number of published ports", most.max_published, 1, 65535)


def bounded(most: NetBounds | None, spec: BoxSpec) -> BoxSpec:
    """What is made when this is asked for. Raises `UnsupportedError` for more than the operator gives."""
    if most is None:
        return spec
    check_rates(most, spec.network)
    seen = set()
    for port in spec.network.ports:
        _check_given(most, port)
        if port.host_port and (port.protocol, port.host_port) in seen:
            raise InvalidArgumentError(f"ports: {port.protocol} port {port.host_port} is asked for twice")
        seen.add((port.protocol, port.host_port))
    ports = tuple(msgspec.structs.replace(port, host_ip="") for port in spec.network.ports)
    return msgspec.structs.replace(spec, network=msgspec.structs.replace(spec.network, ports=ports))


def check_rates(most: NetBounds | None, network: NetPolicy) -> None:
    """Raise `UnsupportedError` for a rate beyond the operator's."""
    for what, asked, highest in _rates(most or NetBounds(), network):
        if asked is not None and highest is not None and asked > highest:
            raise UnsupportedError(f"{what}: this server gives a box at most {highest} bytes a second, not {asked}")


def with_free_ports(most: NetBounds | None, network: NetPolicy) -> NetPolicy:
    """The same network for a second box that runs at the same time: the ports of the host are taken. Raises
    `UnsupportedError`."""
    if most is None:
        ports = tuple(msgspec.structs.replace(port, host_port=0) for port in network.ports)
    else:
        ports = tuple(msgspec.structs.replace(port, host_port=0, host_ip="") for port in network.ports)
        for port in ports:
            _check_given(most, port)
    return msgspec.structs.replace(network, ports=ports)


def reserve(most: NetBounds, network: NetPolicy, others: Sequence[BoxRecord]) -> None:
    """See whether a new box can have its ports beside the other boxes, running or not: nothing may come between this
    and the new record. Raises `AlreadyExistsError`, `ResourceExhaustedError`."""
    wanted = [port for port in network.ports if not port.host_ip]
    if not wanted:
        return
    given = sum(not port.host_ip for other in others for port in other.spec.network.ports)
    if given + len(wanted) > most.max_published:
        raise ResourceExhaustedError(
            f"ports: this server publishes at most {most.max_published} ports at once; remove boxes that have some"
        )
    taken = set(_taken(others))
    for port in wanted:
        if (port.protocol, port.host_port) in taken:
            raise _conflict(port)


def network_of(record: BoxRecord) -> NetPolicy:
    """The network of a box as it is: of one that runs with the ports that were chosen."""
    network, most = record.spec.network, record.bounds or NetBounds()
    rates = {
        what: highest if asked is None else asked if highest is None else min(asked, highest)
        for what, asked, highest in _rates(most, network)
    }
    now = (record.published if record.pid is not None else ()) or network.ports
    told = most.publish_told or most.publish_address or LOOPBACK
    ports = tuple(
        port if wanted.host_ip else msgspec.structs.replace(port, host_ip=told)
        for wanted, port in zip(network.ports, now, strict=True)
    )
    return msgspec.structs.replace(network, ports=ports, **rates)


def open_ports(record: BoxRecord, all_boxes: Sequence[BoxRecord]) -> list[tuple[PublishedPort, socket.socket]]:
    """Listen at the published ports of a box that runs; what was chosen at its start stays. Raises `NetworkError`,
    `UnsupportedError`, `AlreadyExistsError`, `ResourceExhaustedError`."""
    opened: list[tuple[PublishedPort, socket.socket]] = []
    try:
        for port in record.published or record.spec.network.ports:
            listener = _listen(record.bounds, port, all_boxes)
            opened.append((_as_bound(port, listener), listener))
    except BaseException:
        for _, listener in opened:
            listener.close()
        raise
    return opened


# Private functions.


def _listen(most: NetBounds | None, port: PublishedPort, all_boxes: Sequence[BoxRecord]) -> socket.socket:
    if port.host_ip:
        return listen_at(port.host_ip, port.host_port, port.protocol)
    if most is None:  # nobody but the owner of this machine has made and started it
        return listen_at(LOOPBACK, port.host_port, port.protocol)
    _check_given(most, port)
    first, last = most.publish_ports
    if port.host_port:
        listener = _listen_if_free(most.publish_address, port.host_port, port.protocol)
        if listener is None:
            raise _conflict(port)
        return listener
    taken = {number for protocol, number in _taken(all_boxes) if protocol == port.protocol}
    count = last - first + 1
    begin = secrets.randbelow(count)  # not where another box was a moment ago, whose clients may come back
    for step in range(count):
        number = first + (begin + step) % count
        if number not in taken:
            listener = _listen_if_free(most.publish_address, number, port.protocol)
            if listener is not None:
                return listener
    raise ResourceExhaustedError(f"ports: all ports from {first} to {last} of this server are taken")


def _listen_if_free(address: str, number: int, protocol: str) -> socket.socket | None:
    try:
        return listen_at(address, number, protocol)
    except NetworkError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE:
            return None
        raise


def _as_bound(port: PublishedPort, listener: socket.socket) -> PublishedPort:
    host_ip, host_port = listener.getsockname()[:2]
    return msgspec.structs.replace(port, host_ip=port.host_ip or host_ip, host_port=host_port)


def _check_given(most: NetBounds, port: PublishedPort) -> None:
    if not most.publish_address:
        raise UnsupportedError(NOT_PUBLISHED)
    if port.host_ip not in ("", LOOPBACK):  # what a client has that does not choose
        raise UnsupportedError(
            f"ports: this server publishes ports at an address that its operator has chosen, not at {port.host_ip}; "
            "leave the address out"
        )
    first, last = most.publish_ports
    if port.host_port and not first <= port.host_port <= last:
        raise UnsupportedError(
            f"ports: this server gives ports from {first} to {last}, not {port.host_port}; ask for one of them, or "
            "leave it out to get one that is free"
        )


def _taken(records: Sequence[BoxRecord]) -> Iterator[tuple[str, int]]:
    """The ports of the host that boxes have asked for, and those that running ones have."""
    for record in records:
        for port in (*record.spec.network.ports, *(record.published if record.pid is not None else ())):
            if port.host_port:
                yield port.protocol, port.host_port


def _conflict(port: PublishedPort) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"ports: {port.protocol} port {port.host_port} is taken at this server; ask for another one, or leave it out "
        "to get one that is free"
    )


def _rates(most: NetBounds, network: NetPolicy) -> tuple[tuple[str, int | None, int | None], ...]:
    return (
        ("send_rate", network.send_rate, most.send_rate),
        ("receive_rate", network.receive_rate, most.receive_rate),
    )
