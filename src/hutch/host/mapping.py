"""Which ids the users of boxes have on this host.

As root, box ids 0 … 65535 are host ids 200000 … 265535: no account of the host, so a process that leaves its box is
nobody. As an ordinary user, the box's root is that user, and the other ids come from the user's subordinate ranges
(subuid(5), newuidmap(1)); where there are none, the box has the single id 0.
"""

from __future__ import annotations

import functools
import os
import pwd
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hutch.host.binary import agent_path

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT_BASE = 200_000
COUNT = 65_536


class Mapping(msgspec.Struct, frozen=True, kw_only=True):
    """``uid_map``/``gid_map``: the box's user namespace, as /proc/PID/uid_map takes it. ``outer_uid``/``outer_gid``:
    the maps of the user namespace in which an ordinary user's boxes are prepared; ``None`` as root. ``count``: ids
    that a box has. ``owner``: the id, in the namespace in which boxes are prepared, of the box's root."""

    uid_map: str
    gid_map: str
    owner: int
    count: int
    outer: tuple[str, str] | None = None

    @property
    def rootless(self) -> bool:
        """Whether boxes are made without the host's root."""
        return self.outer is not None

    @property
    def single(self) -> bool:
        """Whether a box has only the id 0."""
        return self.count == 1

    def wrap(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs ``argv`` where files of box users can be read, changed and removed."""
        return [str(agent_path()), "mapped", *self.outer, "--", *argv] if self.outer else list(argv)


@functools.cache
def current() -> Mapping:
    """Return the mapping for this process's user."""
    if os.geteuid() == 0 and _host_ids_reach(ROOT_BASE + COUNT):
        line = f"0 {ROOT_BASE} {COUNT}"
        return Mapping(uid_map=line, gid_map=line, owner=ROOT_BASE, count=COUNT)
    uid, gid = os.geteuid(), os.getegid()
    uids = _subordinate(Path("/etc/subuid"), uid)
    gids = _subordinate(Path("/etc/subgid"), uid)
    if uids and gids and shutil.which("newuidmap") and shutil.which("newgidmap"):
        count = min(uids[1], gids[1], COUNT - 1)
        lines = f"0 0 1\n1 1 {count}"  # a range may not span two of the outer namespace's
        return Mapping(
            uid_map=lines,
            gid_map=lines,
            owner=0,
            count=count + 1,
            outer=(f"0 {uid} 1\n1 {uids[0]} {count}", f"0 {gid} 1\n1 {gids[0]} {count}"),
        )
    return Mapping(uid_map="0 0 1", gid_map="0 0 1", owner=0, count=1, outer=(f"0 {uid} 1", f"0 {gid} 1"))


def _host_ids_reach(limit: int) -> bool:
    """Whether this user namespace has all ids below ``limit`` (the host's own has; one inside a container may
    not)."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, _, count = (int(word) for word in line.split())
        if inside == 0 and count >= limit:
            return True
    return False


def _subordinate(path: Path, uid: int) -> tuple[int, int] | None:
    """Return start and count of the user's longest range in a file of subuid(5)'s form."""
    names = {str(uid)}
    try:
        names.add(pwd.getpwuid(uid).pw_name)
        lines = path.read_text().splitlines()
    except (KeyError, OSError):
        return None
    ranges = []
    for line in lines:
        name, _, rest = line.partition(":")
        start, _, count = rest.partition(":")
        if name in names and start.isdigit() and count.isdigit() and int(count) > 0:
            ranges.append((int(count), int(start)))
    if not ranges:
        return None
    count_, start_ = max(ranges)
    return start_, count_
