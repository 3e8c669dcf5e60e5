"""Probes: attempts of a box to reach somebody, in each way that there is. `ask` makes them all at once from inside a
box. What an ordinary user's process needs of the matrix is here; `serve` is the main function of such a process."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import sys
from typing import TYPE_CHECKING, NamedTuple

import anyio
import dns.message
import dns.rcode

from hutch.core.policy import GATEWAY_ADDRESS
from hutch.errors import InvalidStateError
from hutch.runtime.runtime import LocalRuntime
from tests import rootfs
from tests.net.packets import UDP, frame, ipv4, udp
from tests.net.world import GOOD, GOOD6, HOST, METADATA, NAMES, OTHER, PRIVATE

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Collection, Iterable
    from pathlib import Path

    from hutch.runtime.box import LocalBox

PORT, UDP_PORT = 7000, 9999
"""Of those who say again what they are told."""
IMAGE = "busybox:test"
_SECONDS, _MOMENT = 40.0, 0.7


class Place(NamedTuple):
    """From where probes are made. ``loopback``: what leads to the host's; ``names``: the name server; the rest:
    the interface, by what packet sockets reach it, and the address there."""

    loopback: str = GATEWAY_ADDRESS
    names: str = GATEWAY_ADDRESS
    interface: str = "lo"
    peer: str = "000000000000"
    own: str = "192.0.2.2"


PLACES = {"container": Place(), "vm": Place(interface="eth0", peer="525500000001", own="192.0.2.130")}
OUTSIDE = Place(loopback="127.0.0.1", names=NAMES, interface="near", peer="ffffffffffff", own=HOST)


class Probe(NamedTuple):
    """One attempt. ``target``: the address at which it would be seen; ``data``: what is said."""

    name: str
    kind: str
    where: str
    port: int
    data: bytes
    target: str

    def is_admitted(self, answer: bytes) -> bool:
        """Whether an answer is the peer's, and not one of the gateway."""
        match self.name.partition(":")[0]:
            case "http":
                return b" 200 " in answer
            case "tls":
                return answer[:1] == b"\x16"
            case "dns":
                return dns.message.from_wire(answer).rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)
        return self.name.encode() in answer


def probes(place: Place, host_port: int, abstract: str) -> list[Probe]:
    """Return the probes. ``host_port``, ``abstract``: where the host listens."""
    peers = {"good": GOOD, "other": OTHER, "private": PRIVATE, "metadata": METADATA, "ipv6": GOOD6}
    found = [_said(f"tcp:{name}", "tcp", address, PORT, address) for name, address in peers.items()]
    found += [_said(f"udp:{name}", "udp", address, UDP_PORT, address) for name, address in peers.items()]
    found += [
        _said("tcp:host", "tcp", HOST, host_port, HOST),
        _said("tcp:host-loopback", "tcp", place.loopback, host_port, "127.0.0.1"),
        _said("unix:abstract", "unix", abstract, 0, ""),
    ]
    for name, address in (("good.test", GOOD), ("sub.good.test", GOOD), ("other.test", OTHER)):
        found.append(Probe(f"tls:{name}", "tcp", address, 443, _client_hello(name), address))
        request = f"GET /{name} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode()
        found.append(Probe(f"http:{name}", "tcp", address, 80, request, address))
    for name in ("named.test", "sub.named.test", "stranger.test"):  # there are none of the name, so nobody keeps it
        question = dns.message.make_query(name, "A").to_wire()
        found.append(Probe(f"dns:{name}", "udp", place.names, 53, question, NAMES))
    for name, address in (("good", GOOD), ("other", OTHER)):
        found.append(_said(f"icmp:{name}", "icmp", address, 0, address))
        found.append(_said(f"raw:{name}", "raw", address, UDP_PORT, address))
        text = f"packet:{name}"
        data = udp(place.own, address, UDP_PORT, text.encode(), own_port=4446)
        data = frame(ipv4(place.own, address, UDP, data), target=place.peer)
        found.append(Probe(text, "packet", place.interface, UDP_PORT, data, address))
    return found


def _said(name: str, kind: str, where: str, port: int, target: str) -> Probe:
    return Probe(name, kind, where, port, name.encode(), target)


def _client_hello(name: str) -> bytes:
    outgoing = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without a server")


def script(asked: Iterable[Probe]) -> bytes:
    """Return the probes as probes.c reads them."""
    return "".join(f"{each.name} {each.kind} {each.where} {each.port} {each.data.hex()}\n" for each in asked).encode()


class Results:
    """What became of probes, from the lines of probes.c."""

    def __init__(self, asked: Collection[Probe]) -> None:
        self._asked = {each.name: each for each in asked}
        self._waiting = set(self._asked)
        self.admitted: set[str] = set()

    def take(self, line: str) -> None:
        """Take a line."""
        name, event, more = (*line.split(), "")[:3]
        self._waiting.discard(name)
        if event == "answer" and self._asked[name].is_admitted(bytes.fromhex(more)):
            self.admitted.add(name)

    def are_complete(self, awaited: Collection[str]) -> bool:
        """Whether all were tried, and those that are awaited were admitted."""
        return not self._waiting and self.admitted >= set(awaited)


async def ask(box: LocalBox, asked: Collection[Probe], awaited: Collection[str]) -> set[str]:
    """Make the probes, and return which were admitted. Ends a moment after all were tried and those that are
    awaited have answered."""
    results = Results(asked)
    execution = await box.exec("probes", stdin=True)
    chunks = aiter(execution.stdout)
    await execution.stdin.write(script(asked))
    await execution.stdin.close()
    with anyio.move_on_after(_SECONDS) as scope:
        complete = False
        async for line in lines(chunks):
            results.take(line)
            if not complete and results.are_complete(awaited):
                complete = True
                scope.deadline = anyio.current_time() + _MOMENT
    with contextlib.suppress(InvalidStateError):  # all have ended
        await execution.kill()
    async for _ in chunks:
        pass
    await execution.wait()
    return results.admitted


async def lines(chunks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """Return what the program writes, line by line."""
    held = b""
    async for chunk in chunks:
        *whole, held = (held + chunk).split(b"\n")
        for line in whole:
            yield line.decode()


async def serve(home: Path, program: Path, isolation: str) -> None:
    """Make a box with ``program`` (that of probes.c), and for each line of standard input (a policy, what the probes
    depend on, and what is awaited of them) print which were admitted."""
    os.environ["HUTCH_DNS"] = NAMES
    async with LocalRuntime(home) as runtime:
        tree = rootfs.build(home.parent / "image")
        (tree / "bin/probes").write_bytes(program.read_bytes())
        (tree / "bin/probes").chmod(0o755)
        await runtime.images.load(tree, reference=IMAGE)
        box = await runtime.create(IMAGE, network="disabled", isolation=isolation)
        await box.start()
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            outbound, allow, host_port, abstract, awaited = json.loads(line)
            await box.network.update(outbound, allow=allow)
            admitted = await ask(box, probes(PLACES[isolation], host_port, abstract), awaited)
            print(json.dumps(sorted(admitted)), flush=True)
        await box.remove(force=True)
    assert "Traceback" not in (home / "gateway.log").read_text()
