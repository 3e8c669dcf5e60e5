"""The programming interface of Hutch, as protocols.

`Runtime` makes and finds boxes, `Box` runs commands in one, `Execution` is one running command. The embedded runtime
implements them (`hutch.runtime`); code that is written against these protocols does not care where the boxes are.

All methods raise `hutch.errors.HutchError` subclasses and nothing else on purpose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Literal, Self

    from hutch.core.sinks import Sink
    from hutch.types import (
        BoxInfo,
        BoxSpec,
        BoxStats,
        ExecInfo,
        FileInfo,
        ImageInfo,
        Isolation,
        LogEntry,
        LoginInfo,
        Mount,
        NetPolicy,
        Outbound,
        Progress,
        PublishedPort,
        Refusal,
        Result,
        Secret,
        SnapshotInfo,
        VolumeInfo,
    )

    ProgressFunction = Callable[[Progress], None]


class Stdin(Protocol):
    """The standard input of an execution."""

    async def write(self, data: bytes) -> None:
        """Send bytes; returns when they are on their way and waits while the command does not read (back-pressure).

        Raises `InvalidStateError` after `close` or when the execution has none. What a command that has ended, or
        has closed its input, never reads is thrown away.
        """

    async def close(self) -> None:
        """Send end of file (on a terminal: the EOF character). Idempotent."""


class Stream(Protocol):
    """An output of an execution: iterate it to receive the bytes as they come, once."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def read(self) -> bytes:
        """Return all that is left, up to end of file."""

    @property
    def dropped(self) -> int:
        """Bytes that were lost because nobody read them in time, so far."""


class Execution(Protocol):
    """One command in one box. It goes on when nobody watches."""

    @property
    def id(self) -> str:
        """The id."""

    @property
    def stdin(self) -> Stdin:
        """The standard input."""

    @property
    def stdout(self) -> Stream:
        """The standard output (with a terminal: everything)."""

    @property
    def stderr(self) -> Stream:
        """The standard error."""

    async def wait(self, timeout: float | None = None) -> Result:
        """Wait for the end and for every byte to be delivered; may be called often and by many.

        Outputs without a sink that nobody iterates are collected into the result (64 MiB each, then ``truncated``).
        Raises `DeadlineError` when ``timeout`` seconds pass before the command ended (it goes on), the first error
        of a sink, or `RuntimeClosedError`.
        """

    async def signal(self, signum: int) -> None:
        """Send a signal to the process group. Raises `InvalidStateError` after the end."""

    async def kill(self) -> None:
        """Send SIGKILL to the process group. Raises `InvalidStateError` after the end."""

    async def resize(self, rows: int, cols: int) -> None:
        """Set the terminal's size. Raises `InvalidArgumentError` without a terminal or for zero sizes,
        `InvalidStateError` after the end."""

    async def close(self) -> None:
        """Let go of the execution (the command goes on). Idempotent."""

    @property
    def exit_code(self) -> int | None:
        """The exit code, once the terminal event was seen."""


class Files(Protocol):
    """Files of a box. Paths in the box are absolute or relative to its working directory; the operations run as the
    box's user."""

    async def read(self, path: str, *, max_bytes: int = 64 << 20) -> bytes:
        """Return a file's bytes. Raises `NotFoundError`, `InvalidArgumentError` (a directory),
        `ResourceExhaustedError` (too big)."""

    async def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Create or replace a file, atomically; missing parent directories are made."""

    async def put(
        self, source: str | Path, target: str, *, overwrite: bool = True, follow_symlinks: bool = False
    ) -> None:
        """Copy a host file or directory to ``target`` in the box: an existing directory (or one ending in ``/``)
        receives it under its own name, otherwise ``target`` is its new name."""

    async def get(self, source: str, target: str | Path, *, overwrite: bool = True) -> None:
        """Copy a file or directory of the box to the host, by the same naming rule. Symlinks stay symlinks; none can
        lead a write out of ``target``."""

    async def list(self, path: str) -> list[FileInfo]:
        """List a directory."""

    async def stat(self, path: str) -> FileInfo:
        """Describe one file; of a symlink, the link itself. Raises `NotFoundError`."""


class Snapshots(Protocol):
    """Saved disks of a box."""

    async def create(self, name: str) -> SnapshotInfo:
        """Save the disk now. A running box is frozen for the moment of the copy."""

    async def list(self) -> list[SnapshotInfo]: ...

    async def get(self, name: str) -> SnapshotInfo: ...

    async def restore(self, name: str) -> None:
        """Take the box's disk back to the snapshot. The box must not run."""

    async def remove(self, name: str) -> None: ...


class Tunnel(Protocol):
    """A connection to a TCP port of a box."""

    async def send(self, data: bytes) -> None:
        """Send bytes, waiting while the peer does not read. Raises `NetworkError` when it has gone."""

    async def end(self) -> None:
        """Say that nothing more will be sent; what the peer says still arrives. Idempotent."""

    async def receive(self) -> bytes:
        """Return the next bytes, none at the end. Raises `NetworkError` when the connection broke."""

    async def close(self) -> None:
        """Break the connection. Idempotent."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Forward(Protocol):
    """A port of the host that leads to a port of a box, until it is closed (or the runtime is)."""

    @property
    def host_ip(self) -> str:
        """The address on which the host listens."""

    @property
    def host_port(self) -> int:
        """The port at which the host listens."""

    async def close(self) -> None:
        """Take the port away and break its connections. Idempotent."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Ports(Protocol):
    """TCP ports of a box, reached from outside. They need no network of the box; whoever holds the box may connect."""

    async def connect(self, port: int) -> Tunnel:
        """Connect to a port on the box's loopback. Raises `NetworkError` when nobody listens there."""

    async def forward(self, port: int, *, host_port: int = 0, host_ip: str = "127.0.0.1") -> Forward:
        """Let a port of this host (0: one that is free) lead to a port of the box. Raises `NetworkError` when it
        cannot be had."""


class Network(Protocol):
    """The network of a box."""

    async def get(self) -> NetPolicy:
        """Return the policy as it is; of a running box with the ports that were chosen."""

    async def update(self, outbound: Outbound | str | None = None, *, allow: Sequence[str] | None = None) -> NetPolicy:
        """Change whom the box may reach: ``disabled``, ``enabled``, or ``allow-list`` (the default where rules are
        given). Holds at once for a box that runs, and connections that are not allowed any more end.

        Raises `NetworkError` when that could not be brought about.
        """

    async def limit(self, *, send_rate: int | None = None, receive_rate: int | None = None) -> NetPolicy:
        """Change how many bytes a second the box may send and receive, over all its connections and published ports
        together (``None``: as many as the machine can carry). Holds at once for a box that runs.

        Raises `InvalidArgumentError`, and `NetworkError` when it could not be brought about.
        """

    async def log(self) -> list[Refusal]:
        """Return what the box was refused, oldest first; the newest few thousand entries."""


class Box(Protocol):
    """A box."""

    @property
    def id(self) -> str:
        """The id."""

    @property
    def name(self) -> str | None:
        """The name, if it was given one."""

    @property
    def files(self) -> Files:
        """The box's files."""

    @property
    def snapshots(self) -> Snapshots:
        """The box's snapshots."""

    @property
    def network(self) -> Network:
        """The box's network."""

    @property
    def ports(self) -> Ports:
        """The box's ports."""

    async def info(self) -> BoxInfo: ...

    async def start(self) -> None:
        """Start the box (and its main command). Nothing happens when it runs.

        Raises `InvalidStateError` when it is paused.
        """

    async def start_attached(
        self, *, rows: int = 24, cols: int = 80, stdout: Sink | None = None, stderr: Sink | None = None
    ) -> Execution:
        """Start the box and watch its main command from its first byte to its last; without a sink a stream is
        thrown away.

        Raises `InvalidStateError` when the box runs already, `InvalidArgumentError` when it has no main command.
        """

    async def stop(self, *, timeout: float = 5.0) -> None:
        """Stop the box: the stop signal, SIGKILL after ``timeout`` seconds. The files stay. Nothing happens when it
        does not run."""

    async def restart(self, *, timeout: float = 5.0) -> None: ...

    async def pause(self) -> None:
        """Freeze the running box until `resume`. Nothing happens when it is paused.

        Commands and file operations are refused meanwhile (`InvalidStateError`); snapshots, clones, `stop` and
        `remove` work. It stays paused when this process ends, unless the box ends with it.

        Raises `InvalidStateError` when the box does not run, `UnsupportedError` where nothing can freeze it.
        """

    async def resume(self) -> None:
        """Let a paused box go on. Nothing happens when it runs. Raises `InvalidStateError` when it does not."""

    async def kill(self, signum: int = 9) -> None:
        """Send a signal to the main command; SIGKILL ends the whole box. Raises `InvalidStateError` when it does not
        run."""

    async def detach(self) -> None:
        """Let the box go on when the runtime that made it is closed."""

    async def remove(self, *, force: bool = False) -> None:
        """Remove the box and all that it held. A running box needs ``force``."""

    async def exec(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tty: bool = False,
        rows: int = 24,
        cols: int = 80,
        stdin: bool = False,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
        timeout: float | None = None,
        kill_after: float = 2.0,
        linger: float | None = 0.3,
    ) -> Execution:
        """Start a command and return it running. Raises `ExecError` when it cannot be started.

        ``stdout``/``stderr``: an object with ``write(bytes)`` or a callable that takes bytes, sync or async.
        """

    async def run(
        self,
        *command: str,
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        kill_after: float = 2.0,
        linger: float | None = 0.3,
        max_output: int = 64 << 20,
    ) -> Result:
        """Run a command to its end and return what it wrote."""

    async def attach(
        self,
        exec_id: str = "main",
        *,
        after: tuple[int, int] = (0, 0),
        stdout: Sink | None = None,
        stderr: Sink | None = None,
    ) -> Execution:
        """Watch an execution that was started by anyone, from the given positions of (stdout, stderr)."""

    async def executions(self) -> list[ExecInfo]: ...

    async def stats(self) -> BoxStats: ...

    def logs(self, *, follow: bool = False, tail: int | None = None) -> AsyncIterator[LogEntry]:
        """What the main command wrote; ``follow`` goes on until it ends; ``tail``: only the last lines."""

    async def clone(self, name: str | None = None) -> Box:
        """Make a new, stopped box with a copy of this one's disk and configuration."""

    async def fork(self, name: str | None = None) -> Box:
        """Make a new box that goes on where this running VM is, with its memory, processes and disk.

        This one stands still for the moment of the copy. In the new one commands that run here run on under the same
        ids (`attach`); the clock, the host's name, ``/etc/machine-id`` and the kernel's entropy are made anew before
        anything runs. Mounts are the same files in both. The network's rules and secrets are the same; open connections
        to others are reset in the new box, and its published ports get free ports of the host (`network.get`).

        Raises `UnsupportedError` for containers, `InvalidStateError` when the box does not run or is paused.
        """

    async def export(self, path: str | Path) -> None:
        """Write the box (disk, configuration, image) to an archive file."""

    async def wait(self) -> int | None:
        """Wait until the box does not run any more; returns the main command's exit code, if it has one."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the box, or remove it when it was made with ``auto_remove``; a detached box is left alone."""


class Images(Protocol):
    """The local images."""

    async def pull(
        self,
        reference: str,
        *,
        platform: str | None = None,
        always: bool = False,
        progress: ProgressFunction | None = None,
    ) -> ImageInfo: ...

    async def load(
        self,
        path: str | Path,
        *,
        reference: str | None = None,
        platform: str | None = None,
        progress: ProgressFunction | None = None,
    ) -> Sequence[ImageInfo]: ...

    async def bootstrap(
        self,
        flavour: str = "debian",
        *,
        reference: str | None = None,
        packages: Sequence[str] = (),
        progress: ProgressFunction | None = None,
    ) -> ImageInfo: ...

    async def get(self, reference: str) -> ImageInfo: ...

    async def tag(self, reference: str, name: str) -> ImageInfo:
        """Give an image another name; one that has that name loses it. Raises `NotFoundError`."""

    async def remove(self, reference: str) -> Sequence[str]: ...

    async def prune(self, *, all: bool = False) -> int: ...

    async def login(self, registry: str, username: str, password: str, *, prefix: str = "") -> LoginInfo:
        """Keep a login for pulls from a registry (``host[:port]``), for the repositories whose path begins with the
        prefix; the longest one counts. Raises `AlreadyExistsError`."""

    async def logins(self) -> list[LoginInfo]:
        """List the logins that are kept, without their passwords."""

    async def logout(self, login_id: str) -> None:
        """Forget a login. Raises `NotFoundError`."""

    async def list(self) -> list[ImageInfo]: ...


class Volumes(Protocol):
    """Managed volumes: folders that outlive boxes and can be mounted in several."""

    async def create(self, name: str) -> VolumeInfo: ...

    async def list(self) -> list[VolumeInfo]: ...

    async def get(self, name: str) -> VolumeInfo: ...

    async def remove(self, name: str) -> None:
        """Remove a volume and its files. Raises `InvalidStateError` while a box names it."""


class Runtime(Protocol):
    """Makes, finds and removes boxes."""

    @property
    def images(self) -> Images:
        """The local images."""

    @property
    def volumes(self) -> Volumes:
        """The managed volumes."""

    async def create(
        self,
        image: str | BoxSpec,
        *,
        name: str | None = None,
        command: Sequence[str] | None = None,
        entrypoint: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        labels: Mapping[str, str] | None = None,
        cpus: int | None = None,
        memory_mib: int | None = None,
        disk_gb: int | None = None,
        pids: int | None = 4096,
        mounts: Sequence[Mount] = (),
        network: NetPolicy | Outbound | str | Sequence[str] = "disabled",
        ports: Sequence[PublishedPort | int] = (),
        secrets: Sequence[Secret] = (),
        isolation: Isolation | str = "auto",
        auto_remove: bool = False,
        auto_resume: bool = False,
        detach: bool = False,
        hostname: str | None = None,
        tty: bool = False,
        open_stdin: bool = False,
        stop_signal: str | None = None,
        platform: str | None = None,
        pull: Literal["missing", "always", "never"] = "missing",
        progress: ProgressFunction | None = None,
        box_id: str | None = None,
    ) -> Box:
        """Make a box (its state is *configured*; `Box.start` or the first command starts it). The image is pulled
        when absent.

        ``network``: ``"disabled"``, ``"enabled"``, or the rules of an allow-list such as ``["api.example.com"]``.
        ``ports``: TCP ports of the box that are published on the host's loopback (behind a server: where its operator
        lets them be). ``secrets``: values that the box
        uses without having them; their hosts may be reached. ``box_id``: an id of the caller's choice, 12 letters and
        digits at random; the same id twice makes one box, so that a creation whose outcome is not known may be
        repeated. Raises `AlreadyExistsError` when a box with this id was made otherwise.
        """

    async def get(self, box: str) -> Box:
        """Find a box by name, id or unambiguous prefix of the id. Raises `NotFoundError`."""

    async def list(self, *, labels: Mapping[str, str] | None = None) -> list[BoxInfo]: ...

    async def remove(self, box: str, *, force: bool = False) -> None: ...

    async def import_box(self, path: str | Path, *, name: str | None = None) -> Box:
        """Make a box from an archive that `Box.export` wrote. The archive is not trusted."""

    async def info(self) -> dict[str, object]:
        """Facts about this runtime: home, version, engine, isolation, limits that can be enforced, counts."""

    async def close(self) -> None:
        """Stop the boxes that this runtime made and that are not detached, end all waits, release everything.
        Idempotent."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
