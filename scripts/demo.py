"""The demonstration: build two images, serve them from a loopback registry, pull one, run a Python program in a box,
copy a file out.

usage: demo.py        What is built is kept in .cache/demo, so later runs are quick. Both images end up in the
default home.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from demo_images import LAYOUT, NAMES, build, push, registry

ROOT = Path(__file__).parent.parent
HUTCH = ROOT / ".venv/bin/hutch"
PROGRAM = """\
import os, platform, sys
print("Hello from", platform.node(), "on Python", platform.python_version())
print("I am uid", os.getuid(), "and pid", os.getpid(), "and see", len(os.listdir("/proc/self/fd")) - 1, "open files")
with open("/root/result.txt", "w") as file:
    file.write("the answer is %d\\n" % sum(range(1, 9), 6))
sys.exit(7)
"""


def main() -> int:
    """Run the demonstration; returns the exit code."""
    build(say)
    with registry() as address:
        for name in NAMES:
            push(name, address)
        say("Pull both from the registry")
        for name in NAMES:
            hutch("image", "pull", f"{address}/hutch/{name}:latest")
    # Under names that do not depend on the registry's port.
    for name in NAMES:
        hutch("image", "import", "--quiet", str(LAYOUT / name), f"hutch/{name}:latest", show=False)
        hutch("image", "rm", f"{address}/hutch/{name}:latest", show=False)
    hutch("image", "ls")

    say("Run a Python program in a box: live output, exact exit code")
    box = hutch("create", "hutch/python", show=False)
    code = subprocess.run([HUTCH, "exec", box, "--", "python3", "-c", PROGRAM], check=False).returncode
    print(f"exit code {code}")

    say("Copy a file out")
    with tempfile.TemporaryDirectory() as folder:
        hutch("cp", f"{box}:/root/result.txt", folder)
        text = (Path(folder) / "result.txt").read_text()
    print(f"result.txt: {text}", end="")

    say("What the box is, and that nothing of it stays")
    hutch("ls")
    hutch("rm", "-f", box, show=False)
    if code != 7 or text != "the answer is 42\n":
        print("the demonstration failed: the program's exit code or file is not what it should be", file=sys.stderr)
        return 1
    print(f"\nThat was it. Now try:  {HUTCH.relative_to(ROOT)} run --rm -it hutch/python bash")
    return 0


def hutch(*words: str, show: bool = True) -> str:
    """Run the command line as a user would, and show it; returns what it printed."""
    if show:
        print(f"$ hutch {' '.join(words)}", flush=True)
    done = subprocess.run([HUTCH, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"hutch {words[0]} failed")
    if show:
        print(done.stdout, end="")
    return done.stdout.strip()


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
