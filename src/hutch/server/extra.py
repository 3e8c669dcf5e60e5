"""``/v1/x``: what `hutch.sdk.base` has and the public REST interface has no shape for. JSON that mirrors the protocol,
served to our own SDK; the bodies are in `hutch.sdk.remote_wire`."""

from __future__ import annotations

import contextlib
from types import NoneType
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

import anyio
import msgspec
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, Response

from hutch.core.agentproto import FileOp
from hutch.errors import HutchError, InvalidArgumentError, UnsupportedError
from hutch.runtime.logs import Record
from hutch.sdk import remote_wire as wire
from hutch.sdk.base import Box
from hutch.server.answers import Call, described, route
from hutch.server.envelope import envelope, request_id
from hutch.types import BoxInfo, BoxStats, ExecInfo, ImageInfo, LoginInfo, NetPolicy, Refusal, SnapshotInfo, VolumeInfo

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from hutch.sdk.base import Runtime
    from hutch.server.rules import Rules

_LONGEST_WAIT = 60.0


class Host(Box, Protocol):
    """A box with the doors that a server needs beyond the protocol; `hutch.runtime.doors.Doors` tells what they do."""

    async def launch(self, exec_id: str, command: tuple[str, ...], **options: Any) -> tuple[int, int | None]: ...

    async def launch_main(self, rows: int, cols: int) -> None: ...

    async def signal_execution(self, exec_id: str, signum: int) -> None: ...

    async def log_records(self) -> list[Record]: ...


def routes(backend: Runtime, rules: Rules) -> list[BaseRoute]:
    """All routes under ``/v1/x``."""
    x = _Extra(backend, rules)
    box, info = "/v1/x/boxes/{box}", BoxInfo
    return [
        route("GET", "/v1/x/info", x.info, "Facts about the runtime", gives=dict[str, Any]),
        route("GET", "/v1/x/boxes", x.list_boxes, "List boxes", gives=list[BoxInfo], query=("labels?",)),
        route("POST", "/v1/x/boxes", x.create, "Make a box", takes=wire.CreateBody, gives=info),
        route(
            "POST",
            "/v1/x/boxes/import",
            x.import_box,
            "Make a box of an archive",
            gives=info,
            query=("name?",),
            upload=rules.transit,
        ),
        route("GET", box, x.get, "Find a box by name, id or start of the id", gives=info),
        route("DELETE", box, x.remove, "Remove a box", gives=NoneType, query=("force?",)),
        route("POST", f"{box}/start", x.start, "Start a box", takes=wire.StartBody, gives=NoneType),
        route("POST", f"{box}/stop", x.stop, "Stop a box", takes=wire.StopBody, gives=NoneType),
        route("POST", f"{box}/pause", x.pause, "Freeze a box", gives=NoneType),
        route("POST", f"{box}/resume", x.resume, "Let a paused box go on", gives=NoneType),
        route("POST", f"{box}/kill", x.kill, "Signal the main command", takes=wire.SignalBody, gives=NoneType),
        route("POST", f"{box}/detach", x.detach, "Let a box outlive its maker", gives=NoneType),
        route("POST", f"{box}/clone", x.clone, "Copy a box", takes=wire.NameBody, gives=info),
        route("POST", f"{box}/fork", x.fork, "Copy a running box, memory and all", takes=wire.NameBody, gives=info),
        route(
            "POST",
            f"{box}/network",
            x.update_network,
            "Change the network",
            takes=wire.NetworkBody,
            gives=NetPolicy,
        ),
        route(
            "POST",
            f"{box}/network/rates",
            x.limit_network,
            "Change how fast a box may send and receive",
            takes=wire.RatesBody,
            gives=NetPolicy,
        ),
        route("GET", f"{box}/network/log", x.network_log, "What was refused", gives=list[Refusal]),
        route("GET", f"{box}/wait", x.wait, "Wait for the end of a box", gives=wire.Waited, query=("seconds?",)),
        route("GET", f"{box}/stats", x.stats, "What a box uses", gives=BoxStats),
        route("GET", f"{box}/log", x.log, "What the main command wrote", gives=list[Record]),
        route("GET", f"{box}/executions", x.executions, "List executions", gives=list[ExecInfo]),
        # Repeated when its answer is lost, so it must not be undone when the client goes away.
        route("POST", f"{box}/exec", x.exec, "Start a command", takes=wire.ExecBody, gives=wire.Launched, lasting=True),
        route(
            "POST",
            f"{box}/executions/{{execution}}/signal",
            x.signal,
            "Signal a command",
            takes=wire.SignalBody,
            gives=NoneType,
        ),
        route("GET", f"{box}/snapshots", x.list_snapshots, "List snapshots", gives=list[SnapshotInfo]),
        route("POST", f"{box}/snapshots", x.create_snapshot, "Save the disk", takes=wire.NameBody, gives=SnapshotInfo),
        route("GET", f"{box}/snapshot", x.get_snapshot, "Find a snapshot", gives=SnapshotInfo, query=("name",)),
        route("DELETE", f"{box}/snapshot", x.remove_snapshot, "Remove a snapshot", gives=NoneType, query=("name",)),
        route(
            "POST",
            f"{box}/snapshot/restore",
            x.restore_snapshot,
            "Restore the disk",
            takes=wire.NameBody,
            gives=NoneType,
        ),
        described("GET", f"{box}/export", x.export, "Get a box as an archive"),
        route("GET", "/v1/x/images", x.list_images, "List images", gives=list[ImageInfo]),
        route("GET", "/v1/x/image", x.get_image, "Find an image", gives=ImageInfo, query=("reference",)),
        route("DELETE", "/v1/x/image", x.remove_image, "Remove an image", gives=list[str], query=("reference",)),
        route("POST", "/v1/x/images/pull", x.pull, "Fetch an image", takes=wire.PullBody, gives=ImageInfo),
        route(
            "POST",
            "/v1/x/images/load",
            x.load,
            "Load images from an archive",
            gives=list[ImageInfo],
            query=("reference?", "platform?"),
            upload=rules.transit,
        ),
        route(
            "POST",
            "/v1/x/images/bootstrap",
            x.bootstrap,
            "Make an image from the Debian mirror",
            takes=wire.BootstrapBody,
            gives=ImageInfo,
        ),
        route("POST", "/v1/x/images/prune", x.prune, "Remove unused images", takes=wire.PruneBody, gives=int),
        route("POST", "/v1/x/images/tag", x.tag, "Give an image another name", takes=wire.TagBody, gives=ImageInfo),
        route("GET", "/v1/x/logins", x.list_logins, "List logins at registries", gives=list[LoginInfo]),
        route("POST", "/v1/x/logins", x.login, "Keep a login", takes=wire.LoginBody, gives=LoginInfo),
        route("DELETE", "/v1/x/login", x.logout, "Forget a login", gives=NoneType, query=("id",)),
        route("GET", "/v1/x/volumes", x.list_volumes, "List volumes", gives=list[VolumeInfo]),
        route("POST", "/v1/x/volumes", x.create_volume, "Make a volume", takes=wire.NameBody, gives=VolumeInfo),
        route("GET", "/v1/x/volume", x.get_volume, "Find a volume", gives=VolumeInfo, query=("name",)),
        route("DELETE", "/v1/x/volume", x.remove_volume, "Remove a volume", gives=NoneType, query=("name",)),
    ]


async def launch(box: Host, body: wire.ExecBody) -> wire.Launched:
    """Start a command without watching it."""
    options: dict[str, Any] = {
        name: getattr(body, name) for name in body.__struct_fields__ if name not in ("id", "command", "file_op")
    }
    try:
        options["file_op"] = None if body.file_op is None else FileOp(body.file_op)
    except ValueError:
        raise InvalidArgumentError(f"file_op {body.file_op} is not a file operation") from None
    pid, oom_kills = await box.launch(body.id, body.command, **options)
    return wire.Launched(pid=pid, oom_kills=oom_kills)


class _Extra:
    def __init__(self, backend: Runtime, rules: Rules) -> None:
        self._backend = backend
        self._rules = rules

    # Boxes.

    async def info(self, call: Call) -> object:
        return await self._backend.info()

    async def list_boxes(self, call: Call) -> object:
        labels = call.query.get("labels")
        wanted = None if labels is None else wire.loads(labels.encode(), dict[str, str])
        return [self._rules.shown(info) for info in await self._backend.list(labels=wanted)]

    async def create(self, call: Call) -> object:
        body = wire.loads(call.body, wire.CreateBody)
        if any(mount.source for mount in body.spec.mounts):
            raise UnsupportedError("a folder of the host cannot be mounted from afar; use a volume, or copy the files")
        # A box must outlive this process; when it ends with its client, its client ends it.
        spec = msgspec.structs.replace(self._rules.admit(body.spec), detach=True)
        return await self._made(
            await self._backend.create(spec, pull=body.pull, progress=call.progress, box_id=body.id)
        )

    async def import_box(self, call: Call) -> object:
        made = await self._backend.import_box(call.upload, name=call.query.get("name"))
        await made.detach()
        return await self._made(made)

    async def get(self, call: Call) -> object:
        return self._rules.shown(await (await self._box(call)).info())

    async def remove(self, call: Call) -> object:
        await self._backend.remove(call.path["box"], force=call.query.get("force") == "1")
        return None

    async def start(self, call: Call) -> object:
        body = wire.loads(call.body, wire.StartBody)
        box = await self._box(call)
        await (box.launch_main(body.rows, body.cols) if body.fresh else box.start())
        return None

    async def stop(self, call: Call) -> object:
        await (await self._box(call)).stop(timeout=wire.loads(call.body, wire.StopBody).timeout)
        return None

    async def pause(self, call: Call) -> object:
        await (await self._box(call)).pause()
        return None

    async def resume(self, call: Call) -> object:
        await (await self._box(call)).resume()
        return None

    async def update_network(self, call: Call) -> object:
        body = wire.loads(call.body, wire.NetworkBody)
        self._rules.reaching(NetPolicy(outbound=body.outbound, allow=body.allow))
        return await (await self._box(call)).network.update(body.outbound, allow=body.allow)

    async def limit_network(self, call: Call) -> object:
        body = wire.loads(call.body, wire.RatesBody)
        return await (await self._box(call)).network.limit(send_rate=body.send_rate, receive_rate=body.receive_rate)

    async def network_log(self, call: Call) -> object:
        return await (await self._box(call)).network.log()

    async def kill(self, call: Call) -> object:
        await (await self._box(call)).kill(wire.loads(call.body, wire.SignalBody).signal)
        return None

    async def detach(self, call: Call) -> object:
        await (await self._box(call)).detach()
        return None

    async def clone(self, call: Call) -> object:
        made = await (await self._box(call)).clone(wire.loads(call.body, wire.NameBody).name)
        await made.detach()
        return await self._made(made)

    async def fork(self, call: Call) -> object:
        made = await (await self._box(call)).fork(wire.loads(call.body, wire.NameBody).name)
        await made.detach()
        return await self._made(made)

    async def wait(self, call: Call) -> object:
        box = await self._box(call)
        with anyio.move_on_after(_seconds(call)):
            return wire.Waited(running=False, exit_code=await box.wait())
        return wire.Waited(running=True)

    async def stats(self, call: Call) -> object:
        return await (await self._box(call)).stats()

    async def export(self, request: Request) -> Response:
        """The archive, as a file."""
        try:
            with contextlib.ExitStack() as stack:
                path = stack.enter_context(self._rules.transit.place())
                await (await self._backend.get(unquote(request.path_params["box"]))).export(path)
                kept = stack.pop_all()
        except HutchError as error:
            return envelope(error, request_id(request.scope), details=True)
        return FileResponse(path, media_type="application/octet-stream", background=BackgroundTask(kept.close))

    # Executions.

    async def log(self, call: Call) -> object:
        return await (await self._box(call)).log_records()

    async def executions(self, call: Call) -> object:
        return await (await self._box(call)).executions()

    async def exec(self, call: Call) -> object:
        box = await self._box(call)
        return await launch(box, self._rules.starting(wire.loads(call.body, wire.ExecBody)))

    async def signal(self, call: Call) -> object:
        signum = wire.loads(call.body, wire.SignalBody).signal
        await (await self._box(call)).signal_execution(call.path["execution"], signum)
        return None

    # Snapshots.

    async def list_snapshots(self, call: Call) -> object:
        return await (await self._box(call)).snapshots.list()

    async def create_snapshot(self, call: Call) -> object:
        return await (await self._box(call)).snapshots.create(_name(call))

    async def get_snapshot(self, call: Call) -> object:
        return await (await self._box(call)).snapshots.get(_asked(call, "name"))

    async def remove_snapshot(self, call: Call) -> object:
        await (await self._box(call)).snapshots.remove(_asked(call, "name"))
        return None

    async def restore_snapshot(self, call: Call) -> object:
        await (await self._box(call)).snapshots.restore(_name(call))
        return None

    # Images.

    async def list_images(self, call: Call) -> object:
        return await self._backend.images.list()

    async def get_image(self, call: Call) -> object:
        return await self._backend.images.get(_asked(call, "reference"))

    async def remove_image(self, call: Call) -> object:
        return list(await self._backend.images.remove(_asked(call, "reference")))

    async def pull(self, call: Call) -> object:
        body = wire.loads(call.body, wire.PullBody)
        return await self._backend.images.pull(
            body.reference, platform=body.platform, always=body.always, progress=call.progress
        )

    async def load(self, call: Call) -> list[ImageInfo]:
        return list(
            await self._backend.images.load(
                call.upload,
                reference=call.query.get("reference"),
                platform=call.query.get("platform"),
                progress=call.progress,
            )
        )

    async def bootstrap(self, call: Call) -> object:
        body = wire.loads(call.body, wire.BootstrapBody)
        return await self._backend.images.bootstrap(
            body.flavour, reference=body.reference, packages=body.packages, progress=call.progress
        )

    async def prune(self, call: Call) -> object:
        return await self._backend.images.prune(all=wire.loads(call.body, wire.PruneBody).all)

    async def tag(self, call: Call) -> object:
        body = wire.loads(call.body, wire.TagBody)
        return await self._backend.images.tag(body.reference, body.name)

    async def list_logins(self, call: Call) -> object:
        return await self._backend.images.logins()

    async def login(self, call: Call) -> object:
        body = wire.loads(call.body, wire.LoginBody)
        return await self._backend.images.login(body.registry, body.username, body.password, prefix=body.prefix)

    async def logout(self, call: Call) -> object:
        await self._backend.images.logout(_asked(call, "id"))
        return None

    # Volumes.

    async def list_volumes(self, call: Call) -> object:
        return await self._backend.volumes.list()

    async def create_volume(self, call: Call) -> object:
        return await self._backend.volumes.create(_name(call))

    async def get_volume(self, call: Call) -> object:
        return await self._backend.volumes.get(_asked(call, "name"))

    async def remove_volume(self, call: Call) -> object:
        await self._backend.volumes.remove(_asked(call, "name"))
        return None

    # Private methods.

    async def _box(self, call: Call) -> Host:
        box: Any = await self._backend.get(call.path["box"])
        return box  # type: ignore[no-any-return]  # both kinds of boxes have the doors

    async def _made(self, box: Box) -> BoxInfo:
        info = await box.info()
        self._rules.made(info)
        return self._rules.shown(info)


def _asked(call: Call, name: str) -> str:
    value = call.query.get(name)
    if value is None:
        raise InvalidArgumentError(f"the query names no {name}")
    return value


def _name(call: Call) -> str:
    name = wire.loads(call.body, wire.NameBody).name
    if name is None:
        raise InvalidArgumentError("the body names no name")
    return name


def _seconds(call: Call) -> float:
    try:
        seconds = float(call.query.get("seconds", "0"))
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= _LONGEST_WAIT:
        raise InvalidArgumentError(f"seconds is not a number from 0 to {_LONGEST_WAIT:g}")
    return seconds
