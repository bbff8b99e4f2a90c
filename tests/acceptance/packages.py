"""Packages made of the built ones: a next version with all that is in it, and stand-ins that hold nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path


def repack(worker: Path, version: str, folder: Path) -> Path:
    """The worker's package once more, as another version."""
    tree = folder / f"tree-{version}"
    subprocess.run(["dpkg-deb", "--raw-extract", str(worker), str(tree)], check=True)
    old = _set(tree / "DEBIAN" / "control", Version=version)["Version"]
    (site,) = tree.glob("usr/lib/studio-worker/lib/python3*/site-packages")
    init = site / "studio_worker" / "__init__.py"
    init.write_text(init.read_text().replace(old, version))
    for byte_code in (site / "studio_worker").rglob("*.pyc"):
        byte_code.unlink()
    return _pack(tree, folder / f"{worker.name.partition('_')[0]}_{version}_amd64.deb")


def stand_in(like: Path, folder: Path, **fields: str) -> Path:
    """A package with the control fields of another, apart from ``fields``, and no files."""
    tree = folder / "stand-in"
    tree.mkdir()
    subprocess.run(["dpkg-deb", "--control", str(like), str(tree / "DEBIAN")], check=True)
    for script in (tree / "DEBIAN").iterdir():
        if script.name != "control":
            script.unlink()
    found = _set(tree / "DEBIAN" / "control", **fields) | fields
    return _pack(tree, folder / f"{found['Package']}_{found['Version']}_amd64.deb")


def _set(control: Path, **fields: str) -> dict[str, str]:
    """Change fields of a control file; returns those that it had."""
    text = control.read_text()
    had = dict(re.findall(r"^(\S+): (.*)$", text, re.MULTILINE))
    for name, value in fields.items():
        text = re.sub(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.MULTILINE)
    control.write_text(text)
    return had


def _pack(tree: Path, deb: Path) -> Path:
    command = ["dpkg-deb", "--root-owner-group", "-Zzstd", "-z1", "--build", str(tree), str(deb)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return deb
