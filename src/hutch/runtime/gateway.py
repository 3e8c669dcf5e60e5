"""The gateway process of a home: serves the doors and the published ports of all its boxes.

    python -m hutch.runtime.gateway HOME

It knows nothing of its own: what a box may do stands in its record, and whether it runs the engine says. So it can be
killed at any time; `hutch.host.keeper`, or whoever opens the home next, starts it again, and it opens all doors anew.
Until then a box reaches nobody. At most one of them runs for a home (it holds ``locks/gateway``); it ends with its last
box.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import msgspec

from hutch.core.policy import Policy
from hutch.core.secrets import host_rules
from hutch.errors import HutchError, InternalError, NetworkError
from hutch.host import netns, unixsocket
from hutch.host.proc import has_ended, poll_until
from hutch.net.door import Door
from hutch.net.intercept import Interceptor
from hutch.net.journal import Journal
from hutch.net.meter import Meter
from hutch.net.resolver import Resolver, host_sources
from hutch.runtime.bounds import network_of, open_ports
from hutch.runtime.datagrams import serve_datagrams
from hutch.runtime.gatekeeper import REQUEST_BYTES, SOCKET, Reply, Request, is_served, listens
from hutch.runtime.ports import serve_port
from hutch.runtime.records import ALIVE
from hutch.runtime.runtime import LocalRuntime
from hutch.types import Outbound, PublishedPort

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from anyio.abc import TaskGroup

    from hutch.state import BoxRecord
    from hutch.types import BoxSpec

log = logging.getLogger("hutch.net")

_IDLE_SECONDS = 3.0
_DECIDE_SECONDS = 10.0


class _Served:
    """One running box: its door, if it has one, and its published ports, as long as its process lives."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.meter = Meter()
        self.door: Door | None = None
        self.ports: tuple[PublishedPort, ...] = ()
        self.tasks: TaskGroup | None = None
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()


class Gateway:
    """See the module."""

    def __init__(self, runtime: LocalRuntime) -> None:
        self._runtime = runtime
        self._resolver = Resolver(host_sources())
        self._served: dict[str, _Served] = {}
        self._locks: dict[str, anyio.Lock] = {}
        self._requests = 0
        self._idle: asyncio.TimerHandle | None = None
        self._scope = anyio.CancelScope()

    async def run(self, home: Path) -> None:
        """Serve until the last box has ended, or SIGTERM."""
        with self._scope:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                async with anyio.create_task_group() as at_start:  # a box that hangs does not hold up the others
                    for record in self._runtime.store.list_boxes(*ALIVE):
                        if is_served(record.spec):
                            at_start.start_soon(self._sync_at_start, record)
                with _listening(home) as listener:
                    tasks.start_soon(self._end_at_signal)
                    self._rest_soon()
                    await self._accept(listener)

    async def _sync_at_start(self, record: BoxRecord) -> None:
        try:
            await self._sync(record.id)
        except Exception as error:  # one box must not cost the others their doors
            log.error("box %s has no network: %s", record.id, error)

    async def _end_at_signal(self) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM) as received:
            async for _ in received:
                self._scope.cancel()

    # Requests.

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listener)
            self._tasks.start_soon(self._answer, connection)

    async def _answer(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self._requests += 1
        try:
            with connection, contextlib.suppress(OSError, msgspec.DecodeError):
                request = msgspec.json.decode(await loop.sock_recv(connection, REQUEST_BYTES), type=Request)
                await loop.sock_sendall(connection, msgspec.json.encode(await self._reply(request)))
        finally:
            self._requests -= 1
            self._rest_soon()

    async def _reply(self, request: Request) -> Reply:
        try:
            if request.sync:
                await self._sync(request.box)
        except HutchError as error:
            return Reply(code=error.code, message=str(error))
        except Exception as error:
            log.exception("a request failed")
            return Reply(code=InternalError.code, message=f"the gateway failed: {error!r}")
        served = self._served.get(request.box)
        if served is None:
            return Reply()
        meter = served.meter
        return Reply(
            ports=served.ports,
            sent=meter.outward.total,
            received=meter.inward.total,
            connections=meter.connections,
        )

    # Boxes.

    async def _sync(self, box_id: str) -> None:
        async with self._locks.setdefault(box_id, anyio.Lock()):
            record = self._runtime.store.get_box(box_id)
            engine, directory = self._runtime.engines.of_box(box_id)
            pid = engine.observe(directory).pid
            served = self._served.get(box_id)
            if served is not None and (record is None or served.pid != pid or served.ended.is_set()):
                await self._dismiss(served)
                served = None
            if record is None or pid is None:
                self._locks.pop(box_id, None)
                return
            if served is None:
                served = await self._take(record, pid)
            network = network_of(record)
            served.meter.outward.limit(network.send_rate)
            served.meter.inward.limit(network.receive_rate)
            policy = _policy(record.spec)
            if served.door is not None:
                served.door.admit(policy)
            elif policy.outbound is not Outbound.DISABLED:
                await engine.link(directory)
                sockets = await netns.open_door(served.pidfd)
                served.door = Door(
                    sockets, policy, self._resolver, Journal(directory), served.meter, self._interceptor(record)
                )
                assert served.tasks is not None
                served.tasks.start_soon(served.door.run)

    def _interceptor(self, record: BoxRecord) -> Interceptor | None:
        if not record.sealed:
            return None
        contents = self._runtime.vault.open(record.sealed)
        return Interceptor(record.spec.secrets, contents.values, contents.authority)

    async def _take(self, record: BoxRecord, pid: int) -> _Served:
        engine, directory = self._runtime.engines.of_box(record.id)
        pidfd = engine.network(directory)
        if pidfd is None:
            raise NetworkError(f"box {record.spec.name or record.id} has ended")
        served = _Served(pid, pidfd)
        try:
            opened = await self._open_ports(record)
        except BaseException:
            os.close(pidfd)
            raise
        served.ports = tuple(port for port, _ in opened)
        self._served[record.id] = served
        await self._tasks.start(self._serve, record.id, served, [listener for _, listener in opened])
        return served

    async def _open_ports(self, record: BoxRecord) -> list[tuple[PublishedPort, socket.socket]]:
        if not record.spec.network.ports:
            return []
        for other in list(self._served.values()):  # a box that has ended has no ports any more
            if not other.ended.is_set() and has_ended(other.pidfd):
                await self._dismiss(other)
        return open_ports(record, self._runtime.store.list_boxes())

    async def _serve(
        self,
        box_id: str,
        served: _Served,
        listeners: list[socket.socket],
        *,
        task_status: anyio.abc.TaskStatus[None],
    ) -> None:
        try:
            with served.scope:
                box = await self._runtime.get(box_id)
                async with anyio.create_task_group() as tasks:
                    served.tasks = tasks
                    for listener, published in zip(listeners, served.ports, strict=True):
                        serve = serve_port if published.protocol == "tcp" else serve_datagrams
                        tasks.start_soon(serve, listener, box, published.port, served.meter)
                    task_status.started()
                    await anyio.wait_readable(served.pidfd)
                    tasks.cancel_scope.cancel()
        except Exception:
            log.exception("the network of box %s failed", box_id)
        finally:
            for listener in listeners:
                listener.close()
            os.close(served.pidfd)
            served.ended.set()
            if self._served.get(box_id) is served:
                del self._served[box_id]
            self._runtime.channels.drop(box_id)
            self._rest_soon()

    async def _dismiss(self, served: _Served) -> None:
        served.scope.cancel()
        await served.ended.wait()

    # The end.

    def _rest_soon(self) -> None:
        if self._idle is None and not self._served and not self._requests:
            self._idle = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._rest)

    def _rest(self) -> None:
        self._idle = None
        if not self._served and not self._requests:
            self._scope.cancel()


def _policy(spec: BoxSpec) -> Policy:
    """The policy of a box, to which its secrets add their hosts."""
    hosts = [rule for secret in spec.secrets for rule in host_rules(secret)]
    outbound = spec.network.outbound
    if hosts and outbound is Outbound.DISABLED:
        outbound = Outbound.ALLOW_LIST
    return Policy(outbound, (*spec.network.allow, *hosts))


@contextlib.contextmanager
def _listening(home: Path) -> Iterator[socket.socket]:
    listener = unixsocket.listen(home, SOCKET)
    listener.setblocking(False)
    try:
        yield listener
    finally:
        (home / SOCKET).unlink(missing_ok=True)
        listener.close()


async def _serve(home: Path) -> None:
    lock = os.open(home / "locks" / "gateway", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def decided() -> bool:
        """We are the one, or another is. One that holds the lock and does not listen is about to begin, or to end."""
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine.append(lock)
        return bool(mine) or listens(home)

    mine: list[int] = []
    await poll_until(decided, _DECIDE_SECONDS)
    if mine:  # and stays so for as long as this process lives
        async with LocalRuntime(home, is_gateway=True) as runtime:
            await Gateway(runtime).run(home)


def main() -> int:
    """Run the gateway of the home that is the first argument."""
    home = Path(sys.argv[1])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("hpack").setLevel(logging.INFO)  # below that it tells headers, with the values of secrets
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        anyio.run(_serve, home)
    except Exception:
        if (home / "hutch.db").exists():
            raise
    return 0  # nothing is left to serve, or the home has been deleted


if __name__ == "__main__":
    sys.exit(main())
