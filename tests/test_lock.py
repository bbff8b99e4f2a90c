"""`make lock`: which wheels, by their hashes, the packages of torch are built from."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TAG = "py3-none-any"


def wheel(folder: Path, name: str, version: str, *requires: str) -> str:
    """A wheel with nothing in it; returns its hash."""
    file_name = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{file_name}-{TAG}.whl"
    needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
    with zipfile.ZipFile(path, "w") as archive:
        about = f"{file_name}.dist-info"
        archive.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
        )
        archive.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {TAG}\n")
        archive.writestr(f"{about}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lock(tree: Path, wheels: Path, name: str) -> subprocess.CompletedProcess[str]:
    """The script on a source tree of its own, with these wheels and no index."""
    for path in ("pyproject.toml", "packaging/constraints.txt", "packaging/lock"):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        copy(ROOT / path, tree / path)
    return subprocess.run(
        [sys.executable, tree / "packaging/lock/lock.py", name],
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("PIP_")},
            "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels),
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_torch_for_cuda_12_is_locked_where_its_wheels_are(tmp_path: Path) -> None:
    """Where pip finds PyTorch's build for CUDA 12.6, its lock is written with the hashes of what it needs,
    and of nothing that the worker's own package has.
    """
    pins = (ROOT / "packaging" / "constraints.txt").read_text().splitlines()
    version = next(pin.partition("==")[2] for pin in pins if pin.startswith("torch=="))
    shared = next(pin.partition("==")[2] for pin in pins if pin.startswith("filelock=="))
    (tmp_path / "wheels").mkdir()
    needs = "nvidia-cublas-cu12==12.6.4.1", "filelock"
    hashes = {
        f"torch=={version}+cu126": wheel(tmp_path / "wheels", "torch", f"{version}+cu126", *needs),
        "nvidia-cublas-cu12==12.6.4.1": wheel(tmp_path / "wheels", "nvidia-cublas-cu12", "12.6.4.1"),
    }
    wheel(tmp_path / "wheels", "torch", f"{version}+cpu")
    wheel(tmp_path / "wheels", "filelock", shared)
    done = lock(tmp_path / "tree", tmp_path / "wheels", "torch-cuda12")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "tree/packaging/lock/torch-cuda12.txt").read_text().splitlines()
    told = dict(line.split(" --hash=sha256:") for line in lines if not line.startswith("#"))
    assert told == hashes


def test_lock_whose_wheels_are_nowhere_stays_as_it_is(tmp_path: Path) -> None:
    """Without the index that has them no lock is invented: the command fails and says which is old."""
    (tmp_path / "wheels").mkdir()
    before = {path.name: path.read_bytes() for path in (ROOT / "packaging" / "lock").glob("*.txt")}
    done = lock(tmp_path / "tree", tmp_path / "wheels", "torch-cuda12")
    assert done.returncode == 1
    assert "not renewed" in done.stderr
    assert done.stderr.rstrip().endswith("torch-cuda12")
    after = {path.name: path.read_bytes() for path in (tmp_path / "tree/packaging/lock").glob("*.txt")}
    assert after == before
