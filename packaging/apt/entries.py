"""What a package is to the repository: its entry in a suite, its name for good, and which one is the newest.

Owns the calls of Debian's tools; writes nothing.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BOOTSTRAP = "studio-worker-archive-keyring"
"""The package that a new box starts with: the highest version of it lies at a name that stays the same."""


class Refused(Exception):
    """The text says what is wrong and what to do."""


@dataclass(frozen=True)
class Entry:
    """One package of a suite, and the paragraph that describes it."""

    package: str
    version: str
    file: str
    sha256: str
    paragraph: str

    @classmethod
    def parse(cls, paragraph: str) -> Entry:
        """From a paragraph of apt-ftparchive's."""
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line)
        package, version = fields["Package"], fields["Version"]
        return cls(package, version, fields["Filename"], fields["SHA256"], paragraph.strip())

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


def checked(debs: Iterable[Path], published: dict[str, Entry]) -> dict[str, Path]:
    """The packages by the names that they get, each of which stands for one content for good."""
    named: dict[str, Path] = {}
    known = {file: entry.sha256 for file, entry in published.items()}
    for deb in debs:
        if not deb.is_file():
            raise Refused(f"{deb} is not there")
        form = "${Package} ${Version} ${Architecture}"
        package, version, architecture = output(
            "dpkg-deb", "--show", f"--showformat={form}", str(deb)
        ).split()
        name = f"{package}_{version.rpartition(':')[2]}_{architecture}.deb"
        with deb.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if known.setdefault(f"pool/{name}", digest) != digest:
            cure = "a change needs a new version"
            if package == BOOTSTRAP:
                own = f"KEYRING_VERSION={version.partition('+')[0]}+1"
                cure = (
                    f"URL or KEY (its last day, too) differs from last time; if it should: {own}, or the next"
                )
            raise Refused(f"{name} is published with other contents: {cure}")
        named[f"pool/{name}"] = deb
    return named


def newest(entries: Iterable[Entry]) -> Entry | None:
    """The highest version, by Debian's order."""
    highest: Entry | None = None
    for entry in entries:
        if highest is None:
            highest = entry
            continue
        compare = ["dpkg", "--compare-versions", entry.version, "gt", highest.version]
        if subprocess.run(compare).returncode == 0:
            highest = entry
    return highest


def describe(what: str, path: str, *, cwd: Path, **fields: str) -> str:
    """apt-ftparchive's answer; hashes other than SHA-256 are left out."""
    options = {f"APT::FTPArchive::{each}": "false" for each in ("MD5", "SHA1", "SHA512")}
    options |= {f"APT::FTPArchive::Release::{key}": value for key, value in fields.items()}
    options["APT::FTPArchive::DoByHash"] = "true"
    given = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return output("apt-ftparchive", *given, what, path, cwd=cwd)


def output(*command: str, cwd: Path | None = None) -> str:
    """What a command prints; it fails with what it complains of."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Refused(f"{command[0]} is missing: apt install apt-utils gnupg") from error
    if done.returncode != 0:
        raise Refused("; ".join(done.stderr.split("\n")).strip("; ") or f"{command[0]} failed")
    return done.stdout
