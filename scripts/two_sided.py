"""Prove that the promises are tested: break each one in a scratch copy, and demand that its tests notice.

    python scripts/two_sided.py [NAME…] [--jobs N]

A file in tests/promises is a unified diff that breaks one promise. Its header:

    promise: what the patch breaks, in words
    tests: the pytest arguments of the tests that guard it (the line may be repeated)

For each of them: the tests pass without the patch (all guards run once, in an unpatched copy), the patch applies, and
with it at least one of the tests fails. Anything else is a failure of this script. Needs root, as the tests do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PROMISES = ROOT / "tests" / "promises"
COPIED = ("src", "agent", "tests", "pyproject.toml")
TESTS_FAILED = 1
"""Pytest's exit code for failed tests; others mean that they could not be run."""


class Mutation(NamedTuple):
    """One promise broken."""

    name: str
    promise: str
    tests: tuple[str, ...]
    patch: Path

    @property
    def native(self) -> bool:
        """Whether the agent must be built anew."""
        return "\n+++ b/agent/" in self.patch.read_text()


class Outcome(NamedTuple):
    """What became of a mutation."""

    mutation: Mutation
    killed: bool
    seconds: float
    note: str


def load(path: Path) -> Mutation:
    """Read a patch's header."""
    fields: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("--- "):
            break
        key, separator, value = line.partition(": ")
        if separator:
            fields.setdefault(key, []).append(value.strip())
    tests = tuple(word for line in fields.get("tests", []) for word in line.split())
    if not tests or "promise" not in fields:
        raise SystemExit(f"{path}: the header needs 'promise: …' and 'tests: …'")
    return Mutation(path.stem, fields["promise"][0], tests, path)


def copy_tree(target: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*cache*")
            shutil.copytree(source, target / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(source, target / name)


def run_tests(tree: Path, tests: tuple[str, ...], *, first_only: bool) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy of the tree."""
    environment = {name: value for name, value in os.environ.items() if name != "HUTCH_AGENT"}
    environment |= {"PYTHONPATH": f"{tree / 'src'}:{tree}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    command += [f"--basetemp={tree / 'tmp'}", *(["-x"] if first_only else []), *tests]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=300)


def build_agent(tree: Path) -> str:
    """Build the agent of a copy; returns what went wrong."""
    done = subprocess.run(["make", "-C", str(tree / "agent")], capture_output=True, text=True, check=False)
    return done.stderr[-500:] if done.returncode else ""


def last_line(text: str) -> str:
    """The summary line of a test run."""
    return (text.strip().splitlines() or ["no output"])[-1].strip("= ")


def try_mutation(mutation: Mutation) -> Outcome:
    """Apply one patch to a copy and run its tests."""
    began = time.monotonic()

    def outcome(killed: bool, note: str) -> Outcome:
        return Outcome(mutation, killed, time.monotonic() - began, note)

    with tempfile.TemporaryDirectory(prefix="hutch-two-sided-") as name:
        tree = Path(name)
        tree.chmod(0o755)
        copy_tree(tree)
        applied = subprocess.run(
            ["patch", "-p1", "--fuzz=0", "--batch", "-i", str(mutation.patch)],
            cwd=tree, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if applied.returncode:
            return outcome(False, "the patch does not apply: " + last_line(applied.stdout))
        if mutation.native and (problem := build_agent(tree)):
            return outcome(False, f"the agent cannot be built: {problem}")
        try:
            done = run_tests(tree, mutation.tests, first_only=True)
        except subprocess.TimeoutExpired:
            return outcome(False, "the tests did not end")
        if done.returncode == 0:
            return outcome(False, "SURVIVED: no test noticed")
        if done.returncode != TESTS_FAILED:
            return outcome(False, f"the tests could not be run: {last_line(done.stdout + done.stderr)}")
        return outcome(True, last_line(done.stdout))


def check_green(mutations: list[Mutation]) -> str:
    """Run all guards without a patch; returns what went wrong."""
    tests = tuple(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
    with tempfile.TemporaryDirectory(prefix="hutch-two-sided-") as name:
        tree = Path(name)
        tree.chmod(0o755)
        copy_tree(tree)
        if problem := build_agent(tree):
            return problem
        done = run_tests(tree, tests, first_only=False)
        return "" if done.returncode == 0 else done.stdout[-3000:] + done.stderr[-1000:]


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these mutations")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    mutations = [load(path) for path in sorted(PROMISES.glob("*.patch"))]
    if unknown := set(options.names) - {mutation.name for mutation in mutations}:
        raise SystemExit(f"no such mutation: {', '.join(sorted(unknown))}")
    mutations = [m for m in mutations if not options.names or m.name in options.names]
    if problem := check_green(mutations):
        print(f"not green without a patch:\n{problem}")
        return 1
    print(f"green without a patch; {len(mutations)} mutations", flush=True)
    width = max(len(mutation.name) for mutation in mutations)
    bad = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(try_mutation, mutations):
            bad += not outcome.killed
            mark = "red " if outcome.killed else "BAD "
            print(
                f"{mark} {outcome.mutation.name:{width}}  {outcome.seconds:5.1f} s  {outcome.mutation.promise}",
                flush=True,
            )
            if not outcome.killed:
                print(f"     {outcome.note}", flush=True)
    print(f"{len(mutations) - bad} of {len(mutations)} promises are guarded")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
