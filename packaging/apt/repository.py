"""A signed apt repository: a folder of files that any web server serves.

``pool/`` holds each package once under its version, older versions beside newer ones, so that a box can go
back. A suite is a list of them, its ``Packages``; apt-ftparchive describes packages and suites, gpg signs.
What has been published under a version is never replaced: apt would not notice, and two boxes would differ.
There is no ``Valid-Until``: docs/releasing.md says why.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

ORIGIN = "studio-worker"
SUITES = {
    "candidate": "What becomes stable next, for boxes that may try it",
    "stable": "Released versions",
}
ARCHITECTURE = "amd64"
PACKAGES = f"main/binary-{ARCHITECTURE}/Packages"
SIGNED = ("Release", "Release.gpg", "InRelease")
"""In the order in which they are replaced: apt reads the last one first, and by its hashes all the rest."""
BOOTSTRAP = "studio-worker-archive-keyring"
"""The package that a new box starts with: its newest version lies at a name that stays the same."""


class Refused(Exception):
    """The text says what is wrong and what to do."""


@dataclass(frozen=True)
class Entry:
    """One package of a suite, and the paragraph that describes it."""

    package: str
    version: str
    file: str
    paragraph: str

    @classmethod
    def parse(cls, paragraph: str) -> Entry:
        """From a paragraph of apt-ftparchive's."""
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line)
        return cls(fields["Package"], fields["Version"], fields["Filename"], paragraph.strip())


class Repository:
    """The folder, and what is done to it; every method leaves it whole and signed.

    Args:
        folder: made where it is missing.
        keys: fingerprints of the keys that sign, of the key ring in GNUPGHOME.
        epoch_s: the date that suites get; None: now.
    """

    def __init__(self, folder: Path, keys: Sequence[str], epoch_s: int | None) -> None:
        self.folder = folder
        self._keys = keys
        self._epoch_s = epoch_s

    def add(self, suite: str, debs: Iterable[Path]) -> None:
        """Take packages into the pool and into a suite.

        Raises:
            Refused: another file was published under that name before.
        """
        taken = [self._take(deb) for deb in debs]
        self._write(suite, self.read(suite) | {entry.file: entry for entry in taken})
        for other in SUITES:
            if not (self.folder / "dists" / other).exists():
                self._write(other, {})  # apt update is to find it from the first day on

    def promote(self) -> None:
        """All that candidate has belongs to stable, too; what stable had stays beside it."""
        self._write("stable", self.read("stable") | self.read("candidate"))

    def withdraw(self, suite: str, package: str, version: str) -> None:
        """Take one version out of a suite, and out of the pool where no suite has it any more.

        Raises:
            Refused: the suite has no such version.
        """
        entries = self.read(suite)
        gone = [
            file for file, entry in entries.items() if (entry.package, entry.version) == (package, version)
        ]
        if not gone:
            raise Refused(f"{suite} has no {package} {version}")
        self._write(suite, {file: entry for file, entry in entries.items() if file not in gone})
        for file in gone:
            if not any(file in self.read(each) for each in SUITES):
                (self.folder / file).unlink()

    def read(self, suite: str) -> dict[str, Entry]:
        """What a suite has, by file."""
        path = self.folder / "dists" / suite / PACKAGES
        if not path.exists():
            return {}
        entries = [Entry.parse(each) for each in path.read_text().split("\n\n") if each.strip()]
        return {entry.file: entry for entry in entries}

    def _take(self, deb: Path) -> Entry:
        """Copy a package into the pool; what is there already stays."""
        if not deb.is_file():
            raise Refused(f"{deb} is not there")
        place = self.folder / "pool" / deb.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not filecmp.cmp(deb, place, shallow=False):
            raise Refused(f"{deb.name} is published with other contents: a change needs a new version")
        if not place.exists():
            part = place.with_suffix(".part")
            shutil.copyfile(deb, part)
            part.replace(place)
        entry = Entry.parse(self._describe("packages", f"pool/{deb.name}"))
        if entry.package == BOOTSTRAP:
            shutil.copyfile(deb, self.folder / f"{BOOTSTRAP}.deb")
        return entry

    def _write(self, suite: str, entries: dict[str, Entry]) -> None:
        """Write and sign a suite beside the one that is served, then put it in its place, file by file."""
        dists = self.folder / "dists"
        dists.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dists, prefix=".") as name:
            new = Path(name)
            (new / PACKAGES).parent.mkdir(parents=True)
            (new / PACKAGES).write_text("".join(f"{entries[file].paragraph}\n\n" for file in sorted(entries)))
            (new / "Release").write_text(self._describe("release", f"dists/{new.name}", suite=suite))
            self._sign(new / "Release")
            # By its hash first: whoever has read the old InRelease still finds what it names, for good.
            by_hash = [each.relative_to(new) for each in new.glob(f"{Path(PACKAGES).parent}/by-hash/*/*")]
            for path in (*by_hash, Path(PACKAGES), *map(Path, SIGNED)):
                target = dists / suite / path
                target.parent.mkdir(parents=True, exist_ok=True)
                (new / path).chmod(0o644)
                (new / path).replace(target)

    def _describe(self, what: str, path: str, *, suite: str | None = None) -> str:
        """apt-ftparchive's answer; hashes other than SHA-256 are left out."""
        options = {f"APT::FTPArchive::{each}": "false" for each in ("MD5", "SHA1", "SHA512")}
        if suite is not None:
            fields = {"Origin": ORIGIN, "Label": ORIGIN, "Suite": suite, "Codename": suite}
            fields |= {"Architectures": ARCHITECTURE, "Components": "main", "Acquire-By-Hash": "yes"}
            fields |= {"Description": SUITES[suite], "Date": formatdate(self._now(), usegmt=True)}
            options |= {f"APT::FTPArchive::Release::{key}": value for key, value in fields.items()}
            options["APT::FTPArchive::DoByHash"] = "true"
        given = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        return _output("apt-ftparchive", *given, what, path, cwd=self.folder)

    def _sign(self, release: Path) -> None:
        gpg = ["gpg", "--batch", "--yes", *(word for key in self._keys for word in ("--local-user", key))]
        if self._epoch_s is not None:
            gpg.append(f"--faked-system-time={self._epoch_s}!")
        signed = release.with_name("InRelease"), release.with_name("Release.gpg")
        _output(*gpg, "--output", str(signed[0]), "--clear-sign", str(release))
        _output(*gpg, "--output", str(signed[1]), "--armor", "--detach-sign", str(release))

    def _now(self) -> float:
        return time.time() if self._epoch_s is None else self._epoch_s


def _output(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Refused(f"{command[0]} is missing: apt install apt-utils gnupg") from error
    if done.returncode != 0:
        raise Refused(done.stderr.strip())
    return done.stdout


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else writes meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def main() -> None:
    """The command line; the Makefile's apt-repo, apt-promote and apt-withdraw call it."""
    parser = argparse.ArgumentParser(description="A signed apt repository in a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--key", action="append", required=True, help="fingerprint; repeat while keys change")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add")
    add.add_argument("suite", choices=SUITES)
    add.add_argument("deb", type=Path, nargs="+")
    commands.add_parser("promote")
    withdraw = commands.add_parser("withdraw")
    withdraw.add_argument("suite", choices=SUITES)
    withdraw.add_argument("package")
    withdraw.add_argument("version")
    given = parser.parse_args()
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    repository = Repository(given.folder, given.key, int(epoch) if epoch else None)
    try:
        with _alone(given.folder):
            if given.command == "add":
                repository.add(given.suite, given.deb)
            elif given.command == "promote":
                repository.promote()
            else:
                repository.withdraw(given.suite, given.package, given.version)
    except Refused as error:
        sys.exit(f"{error}; nothing was published")
    for suite in SUITES:
        for _, entry in sorted(repository.read(suite).items()):
            print(f"{suite:<10} {entry.package} {entry.version}")


if __name__ == "__main__":
    main()
