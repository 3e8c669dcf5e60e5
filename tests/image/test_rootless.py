"""An ordinary user's store: owners are subordinate ids, and the store can be emptied again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.ordinary_user import OrdinaryUser

pytestmark = pytest.mark.root

SCRIPT = """
import io, os, sys, tarfile, tempfile
from pathlib import Path
import anyio
from hutch.host import mapping
from hutch.image import ImageStore

def member(archive, name, content=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))

async def main(home):
    path = home / "rootfs.tar"
    with tarfile.open(path, "w") as archive:
        member(archive, "d", type=tarfile.DIRTYPE, mode=0o700, uid=33, gid=33)
        member(archive, "d/f", b"x", mode=0o4711, uid=33, gid=44)
        member(archive, "d/.wh.gone")
        member(archive, "d/.wh..wh..opq")
        member(archive, "device", type=tarfile.CHRTYPE, devmajor=1, devminor=3)
    store = ImageStore(home / "images")
    (info,) = await store.load(path, reference="x:v1")
    (layer,) = store.layer_paths(info)
    ids = mapping.current()
    look = "import os,sys;p=sys.argv[1]+'/d/';s=os.stat(p+'f');g=os.stat(p+'gone');" \\
        "print(s.st_uid,s.st_gid,oct(s.st_mode),g.st_rdev,os.getxattr(p,'user.overlay.opaque'))"
    seen = await anyio.run_process(ids.wrap(["/usr/bin/python3", "-c", look, str(layer)]))
    print(ids.single, seen.stdout.decode().strip(), (layer / "device").exists())
    await store.prune(all=True)
    print(sorted(p.name for p in (home / "images").rglob("*")))

with tempfile.TemporaryDirectory() as folder:
    anyio.run(main, Path(folder))
"""


@pytest.mark.parametrize("single", [False, True], ids=["subordinate", "single"])
def test_an_ordinary_users_store(ordinary_user: OrdinaryUser, single: bool) -> None:
    setup = "from hutch.host import mapping; mapping._subordinate = lambda *_: None\n" if single else ""
    output = ordinary_user.run("-c", setup + SCRIPT)
    owner = "0 0" if single else "33 44"
    assert output.splitlines() == [
        f"{single} {owner} 0o104711 0 b'y' False",
        "['images', 'index', 'index.json', 'layers', 'locks', 'tmp']",
    ]
