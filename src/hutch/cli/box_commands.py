"""The commands that make, use and remove boxes."""

from __future__ import annotations

from hutch.cli import options
from hutch.cli.parser import Argument, Command, Option
from hutch.cli.shared_options import ALLOW_NET, BOX, JSON, PLATFORM, QUIET, RATES

INTERACTIVE = Option("-i --interactive", "", "forward standard input")
TTY = Option("-t --tty", "", "give the command a terminal")
ENVIRONMENT = (
    Option(
        "-e --env",
        "NAME=VALUE",
        "set a variable; NAME alone passes the caller's",
        parse=options.env,
        many=True,
    ),
    Option(
        "--env-file",
        "FILE",
        "set the variables of a file",
        parse=options.env_file,
        many=True,
        complete="file",
    ),
    Option("-w --workdir", "DIR", "working directory in the box"),
    Option("-u --user", "USER[:GROUP]", "run as this user of the box"),
)
TIMEOUT = Option(
    "--timeout",
    "TIME",
    "end the command after e.g. 30, 500ms, 5m (SIGTERM, SIGKILL 2 s later)",
    parse=options.duration,
)
BOXES = Argument("BOX", "names, ids or unambiguous starts of ids", many=True, complete="box")
SPECIFICATION = (
    Option("--name", "NAME", "name of the box"),
    INTERACTIVE,
    TTY,
    *ENVIRONMENT,
    Option(
        "-v --volume",
        "SOURCE:TARGET[:ro|rw]",
        "mount a host path (begins with / ./ ../ or ~) or a managed volume",
        parse=options.mount,
        many=True,
        complete="file",
    ),
    Option("--network", "MODE", "whom the box may reach (default disabled)", choices=("enabled", "disabled")),
    ALLOW_NET,
    *RATES,
    Option(
        "--secret",
        "NAME[=VALUE]@HOST,...",
        "let requests to these hosts use a value that the box does not get; NAME alone takes the caller's variable",
        parse=options.secret,
        many=True,
    ),
    Option("--pass-opaque", "", "pass on untouched what is not HTTP, or pins certificates, at hosts of secrets"),
    Option(
        "-p --publish",
        "[[ADDRESS:]HOST_PORT:]PORT[/udp]",
        "let a port of the host (by default on its loopback) lead to a port of the box",
        parse=options.publish,
        many=True,
    ),
    Option("--cpus", "N", "number of CPUs", parse=options.cpus),
    Option("-m --memory", "SIZE", "memory, e.g. 512m, 2g; a plain number is MiB", parse=options.memory),
    Option("--disk", "SIZE", "disk, e.g. 10g; a plain number is GB", parse=options.disk),
    Option("--pids", "N", "processes at most (0: no limit)", parse=options.count, default="4096"),
    Option("--entrypoint", "COMMAND", "replace the image's entry point ('' for none)"),
    Option("--hostname", "NAME", "host name in the box"),
    Option(
        "--isolation",
        "KIND",
        "how the box is kept apart",
        default="auto",
        choices=("auto", "vm", "container"),
    ),
    Option("--stop-signal", "SIGNAL", "what `stop` sends to the main command"),
    Option("--auto-resume", "", "let exec start the box again after a stop"),
    Option("-l --label", "KEY=VALUE", "attach a label", parse=options.label, many=True),
    Option("--pull", "WHEN", "when to pull the image", default="missing", choices=("missing", "always", "never")),
    PLATFORM,
    Option("--rm", "", "remove the box when it has ended"),
    QUIET,
)
GRACE = Option("--timeout", "TIME", "time to end by itself before SIGKILL", parse=options.duration, default="10")

BOX_COMMANDS = (
    Command(
        "run",
        "Run",
        "Make a box from an image and run a command in it",
        "run:run",
        (
            Argument("IMAGE", "image to make the box from", complete="image"),
            Argument("COMMAND", "command and its arguments; without it, the image's own", rest=True, optional=True),
        ),
        (
            Option("-d --detach", "", "leave it running in the background and print its id"),
            *SPECIFICATION,
            TIMEOUT,
        ),
        (
            "hutch run --rm debian -- sh -c 'uname -a; id'",
            "hutch run --rm -it debian bash",
            "tar c . | hutch run --rm -i -w /tmp debian tar xv",
            "hutch run -d --name web -v ./site:/srv:ro --memory 512m python -m http.server -d /srv",
        ),
        notes="The box lives as long as the command; its files stay until the box is removed. "
        "The exit code is the command's, or 128+N when signal N ended it. "
        "Ctrl-P Ctrl-Q leaves a terminal and lets the box run on.",
    ),
    Command(
        "create",
        "Run",
        "Make a box without starting it, and print its id",
        "run:create",
        (
            Argument("IMAGE", "image to make the box from", complete="image"),
            Argument(
                "COMMAND",
                "main command; without it the box idles and waits for exec",
                rest=True,
                optional=True,
            ),
        ),
        SPECIFICATION,
        (
            "hutch create --name dev debian && hutch exec -it dev bash",
            "hutch create --memory 1g debian sleep 60",
        ),
    ),
    Command(
        "exec",
        "Run",
        "Run a command in a box",
        "run:exec_",
        (BOX, Argument("COMMAND", "command and its arguments", rest=True)),
        (
            Option("-d --detach", "", "leave it running in the background and print the execution's id"),
            INTERACTIVE,
            TTY,
            *ENVIRONMENT,
            TIMEOUT,
        ),
        (
            "hutch exec dev -- ls -l /",
            "hutch exec -it dev bash",
            "hutch exec -i dev -- sh -c 'cat > /etc/motd' < motd",
            "hutch exec -e LANG=C -w /src --timeout 5m dev make test",
        ),
        notes="A box that was never started is started first. "
        "The exit code is the command's, or 128+N when signal N ended it.",
    ),
    Command(
        "attach",
        "Run",
        "Connect the terminal to a box's main command",
        "run:attach",
        (BOX, Argument("EXECUTION", "another execution of the box, by its id", optional=True)),
        (Option("--no-stdin", "", "only watch"),),
        notes="Ctrl-P Ctrl-Q leaves; the command goes on.",
    ),
    Command(
        "ls",
        "Boxes",
        "List boxes",
        "boxes:ls",
        (),
        (
            Option("-a --all", "", "every box (this is the default)"),
            Option("-r --running", "", "only boxes that run"),
            Option("-l --label", "KEY=VALUE", "only boxes with this label", parse=options.label, many=True),
            Option("-q --quiet", "", "print ids only"),
            Option("--names", "", "print names only (the id of a box without one)"),
            JSON,
        ),
        aliases=("ps", "list"),
    ),
    Command("inspect", "Boxes", "Show all about boxes, as a JSON array", "boxes:inspect", (BOXES,)),
    Command("start", "Boxes", "Start boxes", "boxes:start", (BOXES,)),
    Command("stop", "Boxes", "Stop boxes; their files stay", "boxes:stop", (BOXES,), (GRACE,)),
    Command("restart", "Boxes", "Stop boxes and start them again", "boxes:restart", (BOXES,), (GRACE,)),
    Command("pause", "Boxes", "Freeze boxes with all that runs in them", "boxes:pause", (BOXES,)),
    Command("resume", "Boxes", "Let paused boxes go on", "boxes:resume", (BOXES,), aliases=("unpause",)),
    Command(
        "kill",
        "Boxes",
        "Send a signal to the main command of boxes; KILL ends the whole box",
        "boxes:kill",
        (BOXES,),
        (Option("-s --signal", "SIGNAL", "name or number", parse=options.signum, default="KILL"),),
    ),
    Command(
        "rm",
        "Boxes",
        "Remove boxes and all their files",
        "boxes:rm",
        (Argument("BOX", "names, ids or unambiguous starts of ids", many=True, optional=True, complete="box"),),
        (
            Option("-f --force", "", "also when it runs; do not ask"),
            Option("--all", "", "every box (asks, unless -f)"),
        ),
        aliases=("remove",),
    ),
    Command(
        "logs",
        "Boxes",
        "Print what the main command of a box wrote",
        "boxes:logs",
        (BOX,),
        (
            Option("-f --follow", "", "go on until it ends"),
            Option("-n --tail", "N", "only the last N lines", parse=options.count),
            Option("--timestamps", "", "put the time (UTC) in front"),
        ),
    ),
    Command(
        "stats",
        "Boxes",
        "Show what running boxes use",
        "stats:stats",
        (Argument("BOX", "boxes; without any, all that run", many=True, optional=True, complete="box"),),
        (Option("--watch", "", "again every second, until Ctrl-C"), JSON),
    ),
    Command(
        "cp",
        "Boxes",
        "Copy files between a box and the host",
        "files:cp",
        (
            Argument("SOURCE", "file or directory; BOX:PATH for one in a box", complete="file"),
            Argument("TARGET", "where to; exactly one of the two is BOX:PATH", complete="file"),
        ),
        (
            Option("-L --follow-links", "", "copy what symlinks on the host point to"),
            Option("-n --no-clobber", "", "fail rather than replace a file"),
        ),
        (
            "hutch cp report.csv dev:/tmp/",
            "hutch cp dev:/var/log ./logs",
            "hutch cp ./a:b.txt dev:/tmp/    (a host path with a colon starts with ./ or /)",
        ),
        notes="An existing directory receives the source under its own name; otherwise TARGET is the new name.",
    ),
    Command(
        "clone",
        "Boxes",
        "Make a stopped copy of a box, and print its id",
        "files:clone",
        (BOX,),
        (Option("--name", "NAME", "name of the new box"),),
    ),
    Command(
        "fork",
        "Boxes",
        "Make a copy of a running VM that goes on with all its processes, and print its id",
        "files:fork",
        (BOX,),
        (Option("--name", "NAME", "name of the new box"),),
    ),
    Command(
        "export",
        "Boxes",
        "Write a box (disk, configuration, image) to an archive",
        "files:export",
        (BOX, Argument("FILE", "archive to write", complete="file")),
    ),
    Command(
        "import",
        "Boxes",
        "Make a box from an archive that `export` wrote, and print its id",
        "files:import_",
        (Argument("FILE", "archive", complete="file"),),
        (Option("--name", "NAME", "name of the new box"),),
    ),
)
