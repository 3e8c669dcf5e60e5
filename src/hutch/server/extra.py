"""``/v1/x``: what `hutch.sdk.base` has and the public REST interface has no shape for. JSON that mirrors the protocol,
served to our own SDK; the bodies are in `hutch.sdk.remote_wire`."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

import anyio
import anyio.to_thread
import msgspec
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from hutch.core.agentproto import FileOp
from hutch.errors import HutchError, InvalidArgumentError, UnsupportedError
from hutch.sdk import remote_wire as wire
from hutch.sdk.base import Box
from hutch.server.answers import Call, route

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.routing import BaseRoute

    from hutch.runtime.logs import Record
    from hutch.sdk.base import Runtime
    from hutch.types import BoxInfo, ImageInfo

_LONGEST_WAIT = 60.0


class Host(Box, Protocol):
    """A box with the doors that a server needs beyond the protocol; `hutch.runtime.box.LocalBox` tells what they do."""

    async def launch(self, exec_id: str, command: tuple[str, ...], **options: Any) -> int: ...

    async def launch_main(self, rows: int, cols: int) -> None: ...

    async def signal_execution(self, exec_id: str, signum: int) -> None: ...

    async def log_records(self) -> list[Record]: ...


def routes(backend: Runtime, on_created: Callable[[BoxInfo], None] = lambda info: None) -> list[BaseRoute]:
    """All routes under ``/v1/x``. ``on_created`` is told of every box that a request made, before its answer."""
    x = _Extra(backend, on_created)
    box = "/v1/x/boxes/{box}"
    return [
        route("GET", "/v1/x/info", x.info),
        route("GET", "/v1/x/boxes", x.list_boxes),
        route("POST", "/v1/x/boxes", x.create),
        route("POST", "/v1/x/boxes/import", x.import_box, upload=True),
        route("GET", box, x.get),
        route("DELETE", box, x.remove),
        route("POST", f"{box}/start", x.start),
        route("POST", f"{box}/stop", x.stop),
        route("POST", f"{box}/kill", x.kill),
        route("POST", f"{box}/detach", x.detach),
        route("POST", f"{box}/clone", x.clone),
        route("GET", f"{box}/wait", x.wait),
        route("GET", f"{box}/stats", x.stats),
        route("GET", f"{box}/log", x.log),
        route("GET", f"{box}/executions", x.executions),
        # Repeated when its answer is lost, so it must not be undone when the client goes away.
        route("POST", f"{box}/exec", x.exec, lasting=True),
        route("POST", f"{box}/executions/{{execution}}/signal", x.signal),
        route("GET", f"{box}/snapshots", x.list_snapshots),
        route("POST", f"{box}/snapshots", x.create_snapshot),
        route("GET", f"{box}/snapshot", x.get_snapshot),
        route("DELETE", f"{box}/snapshot", x.remove_snapshot),
        route("POST", f"{box}/snapshot/restore", x.restore_snapshot),
        Route(f"{box}/export", x.export, methods=["GET"], include_in_schema=False),
        route("GET", "/v1/x/images", x.list_images),
        route("GET", "/v1/x/image", x.get_image),
        route("DELETE", "/v1/x/image", x.remove_image),
        route("POST", "/v1/x/images/pull", x.pull),
        route("POST", "/v1/x/images/load", x.load, upload=True),
        route("POST", "/v1/x/images/bootstrap", x.bootstrap),
        route("POST", "/v1/x/images/prune", x.prune),
        route("GET", "/v1/x/volumes", x.list_volumes),
        route("POST", "/v1/x/volumes", x.create_volume),
        route("GET", "/v1/x/volume", x.get_volume),
        route("DELETE", "/v1/x/volume", x.remove_volume),
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
    return wire.Launched(pid=await box.launch(body.id, body.command, **options))


class _Extra:
    def __init__(self, backend: Runtime, on_created: Callable[[BoxInfo], None]) -> None:
        self._backend = backend
        self._on_created = on_created

    # Boxes.

    async def info(self, call: Call) -> object:
        return await self._backend.info()

    async def list_boxes(self, call: Call) -> object:
        labels = call.query.get("labels")
        return await self._backend.list(labels=None if labels is None else wire.loads(labels.encode(), dict[str, str]))

    async def create(self, call: Call) -> object:
        body = wire.loads(call.body, wire.CreateBody)
        if any(mount.source for mount in body.spec.mounts):
            raise UnsupportedError("a folder of the host cannot be mounted from afar; use a volume, or copy the files")
        # A box must outlive this process; when it ends with its client, its client ends it.
        spec = msgspec.structs.replace(body.spec, detach=True)
        return await self._made(await self._backend.create(spec, pull=body.pull, progress=call.progress))

    async def import_box(self, call: Call) -> object:
        made = await self._backend.import_box(call.upload, name=call.query.get("name"))
        await made.detach()
        return await self._made(made)

    async def get(self, call: Call) -> object:
        return await (await self._box(call)).info()

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

    async def wait(self, call: Call) -> object:
        box = await self._box(call)
        with anyio.move_on_after(_seconds(call)):
            return wire.Waited(running=False, exit_code=await box.wait())
        return wire.Waited(running=True)

    async def stats(self, call: Call) -> object:
        return await (await self._box(call)).stats()

    async def export(self, request: Request) -> Response:
        """The archive, as a file."""
        path = Path(await anyio.to_thread.run_sync(tempfile.mktemp, ".tar", "hutch-export-"))
        try:
            await (await self._backend.get(unquote(request.path_params["box"]))).export(path)
        except HutchError as error:
            return Response(wire.dumps(wire.error_body(error)), error.status, media_type="application/json")
        return FileResponse(path, media_type="application/octet-stream", background=BackgroundTask(_unlink, path))

    # Executions.

    async def log(self, call: Call) -> object:
        return await (await self._box(call)).log_records()

    async def executions(self, call: Call) -> object:
        return await (await self._box(call)).executions()

    async def exec(self, call: Call) -> object:
        return await launch(await self._box(call), wire.loads(call.body, wire.ExecBody))

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
        self._on_created(info)
        return info


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


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
