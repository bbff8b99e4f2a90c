"""A release in one command: checked, looked up, built twice, described, signed. `make release` runs it.

Whatever may refuse is asked before the long build. Nothing is published: docs/releasing.md says what is done
with that which lies in ``build/release/VERSION`` in the end. Exit statuses: 0 made; 1 refused, nothing was
built; 3 made, but known vulnerabilities were not looked up; 4 some are known, nothing was built; 5 a build
failed, or the second gave other bytes; 6 built, but not described or not signed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from audit import Unreached, known
from checks import LOCK, ROOT, faults, head, output, packaged_locks, pins, unable_to_sign

HERE = ROOT / "packaging" / "release"
BUILT = ROOT / "build" / "packages"
TOOLS = ROOT / "build" / "release-tools"

REFUSED, UNAUDITED, VULNERABLE, NOT_BUILT, UNFINISHED = 1, 3, 4, 5, 6
ELSEWHERE = {"TZ": "Pacific/Kiritimati", "LC_ALL": "C"}
"""The second build's surroundings: another clock and another language."""
ASSET_LIMIT_BYTES = 2 * 1024**3
"""GitHub's limit for a file of a release (docs.github.com, "About releases")."""


def make_tools() -> None:
    """The environment with the tools of this command, and of nothing else."""
    lock, stamp = LOCK / "release.txt", TOOLS / "installed.txt"
    if stamp.is_file() and stamp.read_bytes() == lock.read_bytes():
        return
    output(sys.executable, "-m", "venv", "--clear", TOOLS)
    output(TOOLS / "bin/pip", "install", "--quiet", "--require-hashes", "--no-deps", "-r", lock)
    shutil.copyfile(lock, stamp)


def audit() -> bool:
    """Look the packages' contents up; returns whether that was possible.

    Raises:
        SystemExit: something is known of them.
    """
    accepted, is_whole = HERE / "accepted-vulnerabilities.txt", True
    found = []
    for lock in packaged_locks():
        pinned = {name: version.partition("+")[0] for name, version in pins(lock).items()}
        try:
            found += known(pinned, accepted, TOOLS / "bin/pip-audit")
        except Unreached as error:
            say("NOT LOOKED UP", f"known vulnerabilities in {lock.name}: {error}")
            is_whole = False
    for line in dict.fromkeys(found):
        say("KNOWN", line)
    if found:
        print(f"renew the lock, or accept them in {accepted.relative_to(ROOT)}", file=sys.stderr)
        sys.exit(VULNERABLE)
    if is_whole:
        say("ok", "no vulnerabilities are known of what goes into the packages")
    return is_whole


def fail(why: str, status: int = NOT_BUILT) -> NoReturn:
    """End, for there is no release."""
    print(why, file=sys.stderr)
    sys.exit(status)


def build(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """``make deb``, and its files moved into ``folder``; returns their hashes.

    Raises:
        SystemExit: it failed.
    """
    folder.mkdir(parents=True)
    log = folder.with_name(f"{folder.name}.log")
    with log.open("w") as file:
        done = subprocess.run(
            ["make", "deb"], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode != 0:
        fail(f"make deb failed: see {log}")
    for pattern in ("*.deb", "*.buildinfo"):
        for each in BUILT.glob(pattern):
            shutil.move(each, folder / each.name)
    return {each.name: sha256(each) for each in sorted(folder.glob("*.deb"))}


def build_twice(version: str, folder: Path) -> list[Path]:
    """The packages, in ``folder``.

    Raises:
        SystemExit: a build failed, or the second gave other bytes.
    """
    profiles = {"DEB_BUILD_PROFILES": "pkg.studio-worker.cuda", **os.environ}
    for left in (folder, folder.with_name(f"{version}.again")):
        shutil.rmtree(left, ignore_errors=True)  # of this version; what others left stays
    first = build(folder, profiles)
    if f"studio-worker_{version}_amd64.deb" not in first:
        fail(f"make deb built no studio-worker {version}, but: {' '.join(first)}")
    again = folder.with_name(f"{version}.again")
    second = build(again, {**profiles, **ELSEWHERE})
    if first != second:
        differing = sorted(name for name in first | second if first.get(name) != second.get(name))
        fail(f"two builds gave different bytes: {' '.join(differing)}: see {again}")
    shutil.rmtree(again)
    say("ok", f"two builds gave the same bytes: {' '.join(first)}")
    return [folder / name for name in first]


def sha256(path: Path) -> str:
    """A file's hash."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(debs: Sequence[Path]) -> None:
    """What is in each package, beside it."""
    for deb in debs:
        name = deb.name.partition("_")[0]
        lock = LOCK / f"{name.removeprefix('studio-worker-')}.txt"
        if not lock.exists():
            lock = LOCK / "libraries.txt"
        changelog = "debian/torch.changelog" if lock.stem.startswith("torch-") else "debian/changelog"
        day = output("dpkg-parsechangelog", f"--file={changelog}", "--show-field=Timestamp")
        output(TOOLS / "bin/python", HERE / "sbom.py", deb, lock, day, deb.with_suffix(".cdx.json"))
    say("ok", "what is in them is written beside them (CycloneDX)")


def sign(folder: Path, key: str | None) -> None:
    """One file of hashes for all, and its signature."""
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(f"{sha256(each)}  {each.name}\n" for each in sorted(folder.iterdir())))
    if key is None:
        say("NOT SIGNED", "SHA256SUMS, as was asked for")
        return
    signature = sums.with_suffix(".asc")
    if why := unable_to_sign(key):
        done = f"all is in {folder.relative_to(ROOT)} but the signature of SHA256SUMS"
        later = f"gpg --local-user {key} --armor --detach-sign {sums.relative_to(ROOT)}"
        fail(f"{key} cannot sign any more: {why}\n{done}; when it can: {later}", UNFINISHED)
    output("gpg", "--batch", "--local-user", key, "--output", signature, "--armor", "--detach-sign", sums)
    output("gpg", "--batch", "--quiet", "--verify", signature, sums)
    say("ok", f"SHA256SUMS is signed by {key}")


def say(outcome: str, what: str) -> None:
    """One line of the report."""
    print(f"{outcome:<14} {what}", flush=True)


def conclude(version: str, folder: Path) -> None:
    """What is there, and what is to be done with it."""
    print(f"\nstudio-worker {version} ({head()}) is in {folder.relative_to(ROOT)}:")
    for each in sorted(folder.iterdir()):
        size = each.stat().st_size
        beyond = "  (beyond 2 GiB: the repository only)" if size >= ASSET_LIMIT_BYTES else ""
        print(f"  {size / 1e6:10.3f} MB  {each.name}{beyond}")
    print(
        f"\nto publish it (docs/releasing.md):\n"
        f"  git tag --sign v{version} && git push --tags\n"
        f"  make apt-repo PACKAGES={folder.relative_to(ROOT)} REPO=... URL=... KEY=...\n"
        f"  the rest of that folder beside the release's notes; some days later make apt-promote"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make a release; see docs/releasing.md.")
    parser.add_argument("version")
    parser.add_argument("--key", help="fingerprint of the key in GNUPGHOME that signs")
    parser.add_argument("--unsigned", action="store_true", help="go on without a key")
    given = parser.parse_args()
    try:
        against = list(faults(given.version, given.key, unsigned=given.unsigned))
        for each in against:
            say("REFUSED", each)
        if against:
            sys.exit(REFUSED)
        say("ok", "tree, versions, changelogs, locks" + ("" if given.key is None else ", key"))
        make_tools()
    except subprocess.CalledProcessError as error:
        fail(f"{shlex.join(map(str, error.cmd))} failed; nothing was built", REFUSED)
    except FileNotFoundError as error:
        fail(f"{error.filename} is missing: apt install git dpkg-dev python3-venv", REFUSED)
    is_audited = audit()
    folder = ROOT / "build" / "release" / given.version
    debs = build_twice(given.version, folder)
    try:
        describe(debs)
        sign(folder, given.key)
    except subprocess.CalledProcessError as error:
        fail(f"{shlex.join(map(str, error.cmd))} failed; the packages are in {folder}", UNFINISHED)
    conclude(given.version, folder)
    if not is_audited:
        print("\nknown vulnerabilities were not looked up: hence exit status 3", file=sys.stderr)
        sys.exit(UNAUDITED)


if __name__ == "__main__":
    main()
