"""Base images from the machine's apt configuration."""

from __future__ import annotations

import io
import shutil
import tarfile
from typing import TYPE_CHECKING

import anyio
import pytest

from hutch.errors import ImageError, InvalidArgumentError
from hutch.image.apt import sources
from hutch.image.bootstrap import busybox_tar

if TYPE_CHECKING:
    from pathlib import Path

    from hutch.image import ImageStore
    from hutch.types import Progress


def apt(folder: Path, **files: str) -> Path:
    (folder / "sources.list.d").mkdir()
    for name, content in files.items():
        stem, _, kind = name.rpartition("_")
        path = folder / "sources.list" if name == "main_list" else folder / f"sources.list.d/{stem}.{kind}"
        path.write_text(content)
    return folder


def test_one_line_sources(tmp_path: Path) -> None:
    folder = apt(
        tmp_path,
        main_list=(
            "# deb http://off.example/debian trixie main\n"
            "deb http://m.example/debian trixie main contrib # note\n"
            "deb-src http://m.example/debian trixie main\n"
            "deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian trixie-updates main\n"
            "deb http://m.example/debian trixie-backports main\n"
        ),
        vendor_list="deb http://vendor.example/apt trixie stable\ndeb http://m.example/security trixie-security main\n",
    )
    assert sources("trixie", folder) == [
        "deb http://m.example/debian trixie main",
        "deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian trixie-updates main",
        "deb http://m.example/security trixie-security main",
    ]


def test_deb822_sources(tmp_path: Path) -> None:
    folder = apt(
        tmp_path,
        debian_sources=(
            "Types: deb deb-src\nURIs: http://a.example/debian\n http://b.example/debian\n"
            "Suites: trixie trixie-updates\n"
            "# a note\nComponents: main\nSigned-By: /usr/share/keyrings/k.gpg\n\n"
            "Enabled: no\nTypes: deb\nURIs: http://off.example\nSuites: trixie\nComponents: main\n\n"
            "Types: deb\nURIs: http://key.example\nSuites: trixie\nComponents: main\nSigned-By:\n -----BEGIN PGP\n .\n"
        ),
    )
    key = "[signed-by=/usr/share/keyrings/k.gpg] "
    assert sources("trixie", folder) == [
        f"deb {key}http://a.example/debian trixie main",
        f"deb {key}http://a.example/debian trixie-updates main",
        f"deb {key}http://b.example/debian trixie main",
        f"deb {key}http://b.example/debian trixie-updates main",
        "deb http://key.example trixie main",
    ]


def test_no_source(tmp_path: Path) -> None:
    folder = apt(tmp_path, vendor_list="deb http://vendor.example/apt trixie-updates main\n")
    with pytest.raises(ImageError, match=r"no apt source .* suite 'trixie'"):
        sources("trixie", folder)


def test_busybox_tree() -> None:
    data = busybox_tar(b"program", ["sh", "ls", "busybox", "sh"])
    assert data == busybox_tar(b"program", ["ls", "sh"])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = {member.name: member for member in archive}
    assert members["bin/sh"].linkname == members["bin/ls"].linkname == "bin/busybox"
    assert members["tmp"].mode == 0o1777
    assert members["bin/busybox"].mode == 0o755


@pytest.mark.root
@pytest.mark.anyio
async def test_busybox_image(store: ImageStore) -> None:
    steps: list[Progress] = []
    info = await store.bootstrap(reference="tiny:v1", flavour="busybox", progress=steps.append)
    assert steps[0].phase == "bootstrap"
    (layer,) = store.layer_paths(info)
    done = await anyio.run_process(["chroot", str(layer), "/bin/sh", "-c", "ls /etc; id -un"])
    assert done.stdout == b"group\npasswd\nroot\n"
    assert (await store.bootstrap(reference="tiny:v2", flavour="busybox")).digest == info.digest


@pytest.mark.root
@pytest.mark.anyio
@pytest.mark.parametrize(
    "wrong",
    [{"flavour": "arch"}, {"suite": "book worm"}, {"suite": "-x"}, {"packages": ["--hook"]}, {"packages": ["a,b"]}],
)
async def test_wrong_wishes(store: ImageStore, wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError, match="not"):
        await store.bootstrap(reference="x:v1", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="no apt source"):
        await store.bootstrap(reference="x:v1", suite="nosuchsuite")


@pytest.mark.root
@pytest.mark.anyio
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="needs mmdebstrap")
async def test_a_failing_bootstrap_leaves_nothing(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "deb [trusted=yes] http://127.0.0.1:1/debian bookworm main"
    monkeypatch.setattr("hutch.image.bootstrap.sources", lambda suite: [source])
    with pytest.raises(ImageError, match=r"image 'x:v1': mmdebstrap failed: .*"):
        await store.bootstrap(reference="x:v1")
    root = store._disk.root
    assert store.list() == []
    assert list((root / "tmp").iterdir()) == list((root / "layers").iterdir()) == []
