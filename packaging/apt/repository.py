"""A signed apt repository: a folder of files that any web server serves.

``pool/`` holds each package once under its version, older versions beside newer ones, so that a box can go
back. A suite is a list of them, its ``Packages``; apt-ftparchive describes packages and suites, gpg signs.
What has been published under a version is never replaced: apt would not notice, and two boxes would differ.
There is no ``Valid-Until``: docs/releasing.md says why.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from email.utils import formatdate
from pathlib import Path

from entries import BOOTSTRAP, Entry, Refused, checked, describe, newest, output

ORIGIN = "studio-worker"
SUITES = {
    "candidate": "What becomes stable next, for boxes that may try it",
    "stable": "Released versions",
}
ARCHITECTURE = "amd64"
PACKAGES = f"main/binary-{ARCHITECTURE}/Packages"
SIGNED = ("Release", "Release.gpg", "InRelease")
"""In the order in which they are replaced: apt reads the last one first, and by its hashes all the rest."""
STAGE = ".new-"
_WRITABLE = "it must be writable for you"
CURES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EROFS: _WRITABLE,
    errno.EEXIST: "REPO has to be a folder",
    errno.ENOTDIR: "REPO has to be a folder",
}


class Repository:
    """The folder, and what is done to it; every method leaves it whole and signed.

    What is new is written and signed in a folder beside it and then moved into its place, so that whatever
    fails on the way leaves nothing behind.

    Args:
        folder: there already, but for `promote` and `withdraw`, which find nothing in one that is not.
        keys: fingerprints of the keys that sign, of the key ring in GNUPGHOME.
        epoch_s: the date that suites get; None: now.
    """

    def __init__(self, folder: Path, keys: Sequence[str], epoch_s: int | None) -> None:
        self.folder = folder
        self._keys = keys
        self._epoch_s = epoch_s

    def add(self, suite: str, debs: Iterable[Path]) -> list[Entry]:
        """Take packages into the pool and into a suite; a file of the pool that no suite lists is replaced.

        Raises:
            Refused: another file was published under that name before; none of them is taken.
        """
        published = {file: entry for each in SUITES for file, entry in self.read(each).items()}
        given = checked(debs, published)
        with self._stage() as stage:
            taken = {}
            for file, deb in given.items():
                if file in published and (self.folder / file).exists():
                    taken[file] = published[file]
                    continue
                (stage / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(deb, stage / file)
                taken[file] = Entry.parse(describe("packages", file, cwd=stage))
            suites = {suite: self.read(suite) | taken}
            for other in SUITES:
                if not (self.folder / "dists" / other).exists():
                    suites.setdefault(other, {})  # apt update is to find it from the first day on
            self._publish(stage, suites)
        return list(taken.values())

    def promote(self) -> list[Entry]:
        """All that candidate has belongs to stable, too; what stable had stays beside it.

        Raises:
            Refused: candidate has nothing.
        """
        candidate, stable = self.read("candidate"), self.read("stable")
        if not candidate:
            raise Refused(f"candidate of {self.folder} has nothing: is this REPO the right one?")
        with self._stage() as stage:
            self._publish(stage, {"stable": stable | candidate})
        return [entry for file, entry in candidate.items() if file not in stable]

    def withdraw(self, suite: str, package: str, version: str) -> list[Entry]:
        """Take one version out of a suite, and out of the pool where no suite has it any more.

        Raises:
            Refused: the suite has no such version.
        """
        entries = self.read(suite)
        gone = [each for each in entries.values() if (each.package, each.version) == (package, version)]
        if not gone:
            raise Refused(f"{suite} of {self.folder} has no {package} {version}")
        with self._stage() as stage:
            self._publish(stage, {suite: {file: each for file, each in entries.items() if each not in gone}})
        for entry in gone:
            if not any(entry.file in self.read(each) for each in SUITES):
                (self.folder / entry.file).unlink(missing_ok=True)
        return gone

    def read(self, suite: str) -> dict[str, Entry]:
        """What a suite has, by file."""
        path = self.folder / "dists" / suite / PACKAGES
        if not path.exists():
            return {}
        entries = [Entry.parse(each) for each in path.read_text().split("\n\n") if each.strip()]
        return {entry.file: entry for entry in entries}

    @contextlib.contextmanager
    def _stage(self) -> Iterator[Path]:
        """A folder on the same disk, out of which files are moved into their places; gone in the end."""
        for left in self.folder.glob(f"{STAGE}*"):
            shutil.rmtree(left)  # by a command that was killed
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=STAGE) as name:
            yield Path(name)

    def _publish(self, stage: Path, suites: dict[str, dict[str, Entry]]) -> None:
        """Write and sign suites, then put them in their place, file by file, and packages before them."""
        for suite, entries in suites.items():
            self._write(stage / "dists" / suite, suite, entries)
        everything = [entry for each in SUITES for entry in suites.get(each, self.read(each)).values()]
        bootstrap = newest(entry for entry in everything if entry.package == BOOTSTRAP)
        if bootstrap is not None:
            new = stage / bootstrap.file
            shutil.copyfile(new if new.exists() else self.folder / bootstrap.file, stage / f"{BOOTSTRAP}.deb")
        moved = [each.relative_to(stage) for each in stage.glob("pool/*")]
        for suite in suites:
            dist = Path("dists", suite)
            # By its hash first: whoever has read the old InRelease still finds what it names, for good.
            moved += [each.relative_to(stage) for each in (stage / dist).glob("main/*/by-hash/*/*")]
            moved += [dist / PACKAGES, *(dist / name for name in SIGNED)]
        moved += [each.relative_to(stage) for each in stage.glob("*.deb")]
        for path in moved:
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (stage / path).chmod(0o644)
            (stage / path).replace(self.folder / path)
        if bootstrap is None:
            (self.folder / f"{BOOTSTRAP}.deb").unlink(missing_ok=True)

    def _write(self, new: Path, suite: str, entries: dict[str, Entry]) -> None:
        """A suite's files, signed."""
        (new / PACKAGES).parent.mkdir(parents=True)
        (new / PACKAGES).write_text("".join(f"{entries[file].paragraph}\n\n" for file in sorted(entries)))
        fields = {"Origin": ORIGIN, "Label": ORIGIN, "Suite": suite, "Codename": suite}
        fields |= {"Architectures": ARCHITECTURE, "Components": "main", "Acquire-By-Hash": "yes"}
        now = time.time() if self._epoch_s is None else self._epoch_s
        fields |= {"Description": SUITES[suite], "Date": formatdate(now, usegmt=True)}
        (new / "Release").write_text(describe("release", ".", cwd=new, **fields))
        self._sign(new / "Release")

    def _sign(self, release: Path) -> None:
        gpg = ["gpg", "--batch", "--yes", *(word for key in self._keys for word in ("--local-user", key))]
        if self._epoch_s is not None:
            gpg.append(f"--faked-system-time={self._epoch_s}!")
        signed = release.with_name("InRelease"), release.with_name("Release.gpg")
        try:
            output(*gpg, "--output", str(signed[0]), "--clear-sign", str(release))
            output(*gpg, "--output", str(signed[1]), "--armor", "--detach-sign", str(release))
        except Refused as error:
            raise Refused(f"{error}; what can sign is shown by gpg --list-secret-keys") from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else writes meanwhile."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _run(repository: Repository, given: argparse.Namespace) -> str:
    """What was asked for; returns what was done."""
    if given.command == "add":
        repository.folder.mkdir(parents=True, exist_ok=True)
    with _alone(repository.folder) if repository.folder.exists() else contextlib.nullcontext():
        if given.command == "add":
            done, what = repository.add(given.suite, given.deb), f"published in {given.suite}"
        elif given.command == "promote":
            done, what = repository.promote(), "promoted to stable"
            if not done:
                return "stable has all of candidate already"
        else:
            done = repository.withdraw(given.suite, given.package, given.version)
            what = f"withdrawn from {given.suite}"
    return f"{what}: {', '.join(map(str, done))}"


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
        print(_run(repository, given))
    except Refused as error:
        sys.exit(f"{error}; nothing was changed")
    except OSError as error:
        cure = CURES.get(error.errno or 0, "see that REPO and PACKAGES are right")
        where = error.filename2 or error.filename or given.folder
        sys.exit(f"{where}: {error.strerror}: {cure}, then do it again")
    for suite in SUITES:
        for _, entry in sorted(repository.read(suite).items()):
            print(f"{suite:<10} {entry}")


if __name__ == "__main__":
    main()
