"""What the packages' machine code wants of the system: no more than Ubuntu 22.04 has, and all of it declared.

Ubuntu 22.04 is the oldest system that the packages are for; Debian 12 and 13 and later Ubuntus have more.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.acceptance import figures
from tests.acceptance.bases import BUILT_ON, SUITE
from tests.acceptance.conftest import Debs

pytestmark = pytest.mark.skipif(SUITE != BUILT_ON, reason="of the packages alone: checked once")

NEWEST = {
    "GLIBC": "2.35",
    "GLIBCXX": "3.4.30",
    "CXXABI": "1.3.13",
    "GCC": "12.0.0",
    "OPENSSL": "3.0.2",
    "LIBFFI_BASE": "8.0",
    "LIBFFI_CLOSURE": "8.0",
    "UUID": "2.36",
    "XZ": "5.2",
    "ZLIB": "1.2.9",
}
"""The newest symbol versions in Ubuntu 22.04's libraries: glibc 2.35, GCC 12, OpenSSL 3.0.2, and so on."""

UBUNTU_2204 = {
    "ca-certificates": "20211016",
    "libbz2-1.0": "1.0.8-5build1",
    "libc6": "2.35-0ubuntu3",
    "libexpat1": "2.4.7-1",
    "libffi8": "3.4.2-4",
    "libgcc-s1": "12-20220319-1ubuntu1",
    "liblzma5": "5.2.5-2ubuntu1",
    "libsqlite3-0": "3.37.2-2",
    "libssl3": "3.0.2-0ubuntu1",
    "libstdc++6": "12-20220319-1ubuntu1",
    "libuuid1": "2.37.2-4ubuntu3",
    "systemd": "249.11-0ubuntu3",
    "zlib1g": "1:1.2.11.dfsg-2ubuntu9",
}
"""Its packages as it was released. Later ones keep these names; libssl3t64 provides libssl3."""

OF_THE_DRIVER = {"libcuda.so.1", "libnvidia-ml.so.1"}
"""They come with the GPU's kernel modules, and are no package's business."""


@dataclass
class Needs:
    """Of one file: libraries by name, and symbol versions by library."""

    libraries: set[str] = field(default_factory=set)
    versions: set[tuple[str, str]] = field(default_factory=set)


@dataclass(frozen=True)
class Package:
    """What a package declares, the names of the libraries in it, and what each file of machine code needs."""

    name: str
    depends: str
    libraries: frozenset[str]
    needs: dict[str, Needs]

    def outside(self) -> Iterator[tuple[str, str]]:
        """Files, and the libraries that they need of others."""
        for path, needs in sorted(self.needs.items()):
            for library in sorted(needs.libraries - self.libraries - OF_THE_DRIVER):
                yield path, library


@pytest.fixture(scope="module")
def packages(installed: Path, debs: Debs, tmp_path_factory: pytest.TempPathFactory) -> list[Package]:
    """The packages as they lie installed in the machine's layer, and the farm's unpacked."""
    here = [read_package(installed, name) for name in ("studio-worker", "studio-worker-torch-cpu")]
    return [*here, unpacked(debs.farm, tmp_path_factory.mktemp("farm"))]


def unpacked(deb: Path, folder: Path) -> Package:
    """A package that is installed nowhere."""
    subprocess.run(["dpkg-deb", "--extract", deb, folder], check=True)
    name, depends = (
        subprocess.run(["dpkg-deb", "--field", deb, field], capture_output=True, text=True, check=True).stdout
        for field in ("Package", "Depends")
    )
    return _package(name.strip(), depends.strip(), sorted(folder.rglob("*")), folder)


def read_package(root: Path, name: str) -> Package:
    """A package that is installed in the system (or layer of one) at ``root``."""
    query = ["dpkg-query", f"--admindir={root / 'var/lib/dpkg'}"]
    listed, depends = (
        subprocess.run([*query, *asked, name], capture_output=True, text=True, check=True).stdout
        for asked in (["--listfiles"], ["--show", "--showformat=${Depends}"])
    )
    return _package(name, depends, [root / line.lstrip("/") for line in listed.splitlines()], root)


def _package(name: str, depends: str, paths: list[Path], root: Path) -> Package:
    code = [path for path in paths if path.is_file() and not path.is_symlink() and _is_code(path)]
    libraries = frozenset(path.name for path in paths if ".so" in path.name)
    return Package(name, depends, libraries, _read(code, root))


def _is_code(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _read(code: list[Path], root: Path) -> dict[str, Needs]:
    """What readelf(1) says of the files."""
    command = ["readelf", "--wide", "--dynamic", "--version-info", "/dev/null", *map(str, code)]
    text = subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
    found: dict[str, Needs] = {}
    for part in re.split(r"^File: ", text, flags=re.MULTILINE)[1:]:
        path, _, told = part.partition("\n")
        needs = found[path.removeprefix(f"{root}/")] = Needs()
        library = ""
        for line in told.splitlines():
            if needed := re.search(r"\(NEEDED\).*\[(.+)\]", line):
                needs.libraries.add(needed[1])
            elif begins := re.search(r"Version: 1  File: (\S+)  Cnt", line):
                library = begins[1]
            elif version := re.search(r"Name: (\S+)  Flags: \S+ +Version: \d", line):
                needs.versions.add((library, version[1]))
    assert len(found) >= len(code), text[-500:]
    return found


def test_no_symbol_is_newer_than_ubuntu_22_04(packages: list[Package]) -> None:
    """Every library and program loads with the glibc, libstdc++ and OpenSSL of the oldest system."""
    too_new = []
    highest: dict[str, tuple[int, ...]] = {}
    for package in packages:
        for path, needs in package.needs.items():
            for library, version in needs.versions:
                if library in package.libraries:
                    continue
                kind = re.fullmatch(r"([A-Z_]+)_([0-9.]+)", version)
                if kind is None or kind[1] not in NEWEST or _numbers(kind[2]) > _numbers(NEWEST[kind[1]]):
                    too_new.append(f"{package.name}: {path} wants {version} of {library}")
                else:
                    highest[kind[1]] = max(highest.get(kind[1], ()), _numbers(kind[2]))
    assert too_new == []
    for name in ("GLIBC", "GLIBCXX", "OPENSSL"):
        figures.note(f"newest {name} needed", ".".join(map(str, highest[name])), f"{NEWEST[name]} or older")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def test_every_library_is_carried_or_declared(packages: list[Package]) -> None:
    """No module fails on a bare system for a library that nothing installed."""
    missing = []
    owners = _owners({library for package in packages for _, library in package.outside()})
    for package in packages:
        declared = {relation.split()[0] for relation in re.split(r"[,|]\s*", package.depends)}
        for path, library in package.outside():
            owner = owners.get(library, "nobody")
            if owner not in declared:
                missing.append(f"{package.name}: {path} needs {library} of {owner}")
    assert missing == []


def _owners(libraries: set[str]) -> dict[str, str]:
    """The packages of this Debian 12 that have the libraries, by their names."""
    folders = ("/lib64", "/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu")
    paths = [f"{folder}/{library}" for folder in folders for library in sorted(libraries)]
    text = subprocess.run(["dpkg", "--search", *paths], capture_output=True, text=True).stdout
    found = re.findall(r"^(\S+?)(?::amd64)?: (/\S+)$", text, re.MULTILINE)
    return {Path(path).name: package for package, path in found}


def test_dependencies_are_what_ubuntu_22_04_has(packages: list[Package]) -> None:
    """No dependency asks for a package that the oldest system lacks, or for a newer one than it has."""
    asked = 0
    for package in packages:
        for relation in package.depends.split(", "):
            alternatives = [each.strip() for each in relation.split("|")]
            if alternatives[0].startswith("studio-worker"):
                continue
            asked += 1
            found = re.fullmatch(r"(\S+)(?: \(>= (\S+)\))?", alternatives[0])
            assert found is not None, relation
            assert found[1] in UBUNTU_2204, relation
            command = ["dpkg", "--compare-versions", UBUNTU_2204[found[1]], "ge", found[2] or "0"]
            assert subprocess.run(command).returncode == 0, relation
    assert asked >= len(UBUNTU_2204)
