"""Renew the lock files beside this script: exact versions and hashes of what goes into the packages.

Run by ``make lock``. pip resolves as it would for an installation, within ``packaging/constraints.txt``, and
reports what it chose; nothing is installed. ``farm.txt`` has what the extra of that name adds. What only
torch needs is locked with torch, once for each build: ``torch-cpu.txt`` and ``torch-cuda12.txt`` want the
index or folder with these builds in pip's configuration (the wheels' versions end in ``+cpu`` and
``+cu126``), ``torch-cuda.txt`` takes the wheel without such an ending. With names of locks as arguments it
renews those alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONSTRAINTS = ROOT / "packaging" / "constraints.txt"
TORCH = "torch"
BUILD = ("pip", "setuptools")
"""What builds the wheels of this project and of libraries that publish none."""
RELEASE = ("cyclonedx-python-lib[json-validation]", "pip-audit")
"""What `make release` asks and describes with."""


@dataclass(frozen=True)
class Chosen:
    """One distribution as pip chose it; ``requires`` are those of its requirements that hold here."""

    name: str
    version: str
    sha256: str
    requires: tuple[Requirement, ...]


def resolve(*wanted: str, constraints: Iterable[str] = ()) -> dict[str, Chosen]:
    """What pip would install for ``wanted``, by canonical name.

    Raises:
        subprocess.CalledProcessError: pip found no answer; it has said why on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, pins = Path(folder, "report.json"), Path(folder, "pins.txt")
        pins.write_text("".join(f"{line}\n" for line in constraints))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "--constraint", str(pins), *wanted]
        subprocess.run(command, check=True)
        entries = json.loads(report.read_text())["install"]
    found = {}
    for entry in entries:
        metadata = entry["metadata"]
        requires = tuple(Requirement(text) for text in metadata.get("requires_dist", ()))
        name = canonicalize_name(metadata["name"])
        sha256 = entry["download_info"]["archive_info"]["hashes"]["sha256"]
        found[name] = Chosen(name, metadata["version"], sha256, requires)
    return found


def reachable(chosen: dict[str, Chosen], start: Iterable[Requirement]) -> set[str]:
    """The names that ``start`` needs by ways that do not go through torch."""
    seen: set[str] = set()
    waiting = [(requirement, "") for requirement in start]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name == TORCH or name not in chosen:
            continue
        extras = ("", *requirement.extras)
        if name in seen and extras == ("",):
            continue
        seen.add(name)
        waiting += [(each, extra) for each in chosen[name].requires for extra in extras]
    return seen


def write(name: str, chosen: Iterable[Chosen], says: str) -> None:
    """One lock file in pip's own format."""
    lines = [f"# {says}", "# Made by: make lock"]
    for each in sorted(chosen, key=lambda each: each.name):
        lines.append(f"{each.name}=={each.version} --hash=sha256:{each.sha256}")
    (HERE / name).write_text("\n".join(lines) + "\n")
    print(f"{name}: {len(lines) - 2} distributions")


def project() -> dict[str, Any]:
    """What pyproject.toml declares."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def packaged() -> set[str]:
    """The worker's own libraries, as they are locked."""
    lines = (HERE / "libraries.txt").read_text().splitlines()
    return {line.partition("==")[0] for line in lines}


def lock_farm(pins: list[str]) -> None:
    """What the extra ``farm`` adds to the worker's own libraries."""
    chosen = resolve(*project()["optional-dependencies"]["farm"], constraints=pins)
    added = (chosen[each] for each in chosen.keys() - packaged())
    write("farm.txt", added, "What a studio on PostgreSQL and S3 needs beside them.")


def lock_cpu(version: str, pins: list[str]) -> None:
    """What the worker needs, and torch for the CPU."""
    wanted = project()["dependencies"]
    chosen = resolve(*wanted, f"{TORCH}=={version}+cpu", constraints=pins)
    ours = reachable(chosen, map(Requirement, wanted))
    write("libraries.txt", (chosen[name] for name in ours), "What studio-worker needs, apart from torch.")
    only_torch = (chosen[name] for name in chosen.keys() - ours)
    write("torch-cpu.txt", only_torch, "torch for the CPU, and what only it needs.")


def lock_cuda(name: str, wanted: str, pins: list[str]) -> None:
    """torch with CUDA, and what is not among the worker's own libraries."""
    pins = [pin for pin in pins if not pin.startswith(f"{TORCH}==")]
    chosen = resolve(wanted, constraints=pins)
    only_torch = (chosen[each] for each in chosen.keys() - packaged())
    write(name, only_torch, "torch with CUDA, and what only it needs.")


def main() -> None:
    """Write the lock files, or those that are named. One that pip finds no answer for stays as it is."""
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    version = next(pin.partition("==")[2] for pin in pins if pin.startswith(f"{TORCH}=="))
    tools = "What make release uses; no package contains it."
    locks: dict[str, Callable[[], None]] = {
        "torch-cpu": lambda: lock_cpu(version, pins),
        # "===" is pip's exact match: "==" would take the CPU build as well, if it is at hand.
        "torch-cuda": lambda: lock_cuda("torch-cuda.txt", f"{TORCH}==={version}", pins),
        "torch-cuda12": lambda: lock_cuda("torch-cuda12.txt", f"{TORCH}=={version}+cu126", pins),
        "farm": lambda: lock_farm(pins),
        "release": lambda: write("release.txt", resolve(*RELEASE, constraints=pins).values(), tools),
        "build": lambda: write(
            "build.txt", resolve(*BUILD).values(), "What builds the wheels; no package contains it."
        ),
    }
    failed = []
    for name in sys.argv[1:] or locks:
        try:
            locks[name]()
        except subprocess.CalledProcessError:
            failed.append(name)
    if failed:
        sys.exit(
            f"not renewed, since pip's configuration names no place that has it all: {', '.join(failed)}"
        )


if __name__ == "__main__":
    main()
