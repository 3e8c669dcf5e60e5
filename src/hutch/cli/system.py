"""info, doctor, setup, completion."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread
import msgspec

from hutch.cli import output
from hutch.cli.progress import Display

if TYPE_CHECKING:
    from hutch.cli.parser import Arguments
    from hutch.cli.session import Session


async def info(session: Session, args: Arguments) -> int:
    """Print facts about the runtime."""
    async with session.runtime() as runtime:
        facts = await runtime.info()
    if args.json:
        output.json_value(facts)
        return 0
    width = max(map(len, facts), default=0) + 1
    for key, value in facts.items():
        plain = msgspec.to_builtins(value)
        output.line(f"{key + ':':<{width}}  {plain if isinstance(plain, str) else json.dumps(plain)}")
    return 0


async def doctor(session: Session, args: Arguments) -> int:
    """Check the machine; 1 when boxes cannot run on it."""
    from hutch.host import doctor as machine

    checks = await anyio.to_thread.run_sync(machine.examine, session.home)
    if args.json:
        output.json_value(checks)
    else:
        output.table(("CHECK", "STATUS", "FOUND", "GIVES"), ((c.name, str(c.status), c.found, c.gives) for c in checks))
        remedies = [check for check in checks if check.remedy]
        if remedies:
            sys.stdout.write("\n")
        for check in remedies:
            output.line(f"{check.name}: {check.remedy}")
        sys.stdout.write("\n")
        output.line(
            "Boxes can run." if machine.able(checks) else "Boxes cannot run here: see the checks marked missing."
        )
    return 0 if machine.able(checks) else 1


async def setup_vm(session: Session, args: Arguments) -> int:
    """Fetch a kernel for VMs, or take the given one, and make the usual template."""
    from hutch.engine.vm import VmEngine
    from hutch.runtime.home import Home

    engine = VmEngine(Home.open(session.home).vm)
    engine.check()
    with Display("VMs are ready", quiet=args.quiet) as display:
        if args.kernel:
            kernel = await engine.kernels.use(Path(args.kernel), Path(args.modules) if args.modules else None)
        else:
            kernel = await engine.kernels.renew(display)
        speed = await engine.set_up(display)
    output.line(f"{kernel.name} {speed}")
    return 0


async def completion(session: Session, args: Arguments) -> int:
    """Print a completion script."""
    from hutch.cli import completion as scripts

    sys.stdout.write({"bash": scripts.bash, "zsh": scripts.zsh, "fish": scripts.fish}[args.shell]())
    return 0
