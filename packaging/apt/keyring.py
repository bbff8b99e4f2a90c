"""The package by which a box knows the repository: key, address, and examples of what else apt may be told.

Apart from the worker's own build, since key and address are the operator's: the key comes from the key ring
in GNUPGHOME. Its version is that of the release which it is published with.
"""

from __future__ import annotations

import argparse
import gzip
import os
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from entries import BOOTSTRAP as NAME

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEYRING = f"usr/share/keyrings/{NAME}.gpg"
SOURCES = "etc/apt/sources.list.d/studio-worker.sources"
DOC = f"usr/share/doc/{NAME}"


def from_changelog(field: str) -> str:
    """A field of the newest entry of the worker's changelog."""
    command = ["dpkg-parsechangelog", f"--file={ROOT / 'debian/changelog'}", f"--show-field={field}"]
    return subprocess.run(command, check=True, capture_output=True).stdout.decode().strip()


def public(keys: list[str]) -> bytes:
    """The public halves, as apt reads them.

    Raises:
        SystemExit: the key ring has none of that name.
    """
    found = b""
    for key in keys:
        command = ["gpg", "--batch", "--export-options=export-minimal", "--export", key]
        exported = subprocess.run(command, check=True, capture_output=True).stdout
        if not exported:
            sys.exit(f"no key {key} in {os.environ.get('GNUPGHOME', '~/.gnupg')}: name it by its fingerprint")
        found += exported
    return found


def reachable(text: str) -> str:
    """The repository's address, of a kind that apt fetches from.

    Raises:
        SystemExit: it is none.
    """
    try:
        parts = urlsplit(text)
        is_one = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_one = False
    if not is_one or parts.query or parts.fragment or set(text) & set(string.whitespace):
        sys.exit(f"URL={text}: give it as https://HOST/FOLDER, as boxes reach the repository")
    return text.rstrip("/")


def fill(tree: Path, keys: list[str], address: str, version: str) -> None:
    """Everything that is in the package."""
    maintainer = from_changelog("Maintainer")
    files = {
        KEYRING: public(keys),
        SOURCES: (HERE / "studio-worker.sources").read_text().replace("@ADDRESS@", address).encode(),
        f"{DOC}/copyright": (ROOT / "debian" / "copyright").read_bytes(),
        f"{DOC}/changelog.gz": gzip.compress(
            f"{NAME} ({version}) stable; urgency=medium\n\n  * The repository at {address}.\n\n"
            f" -- {maintainer}  {from_changelog('Date')}\n".encode(),
            mtime=0,
        ),
        "DEBIAN/conffiles": f"/{SOURCES}\n".encode(),
        "DEBIAN/control": (HERE / "control")
        .read_text()
        .replace("@VERSION@", version)
        .replace("@MAINTAINER@", maintainer)
        .encode(),
    }
    files[f"usr/share/lintian/overrides/{NAME}"] = (HERE / "lintian-overrides").read_bytes()
    files |= {f"{DOC}/examples/{each.name}": each.read_bytes() for each in (HERE / "examples").iterdir()}
    sums = "DEBIAN/md5sums"
    for name, content in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    packed = sorted(name for name in files if not name.startswith(("DEBIAN/", "etc/")))
    command = ["md5sum", *packed]
    (tree / sums).write_bytes(subprocess.run(command, cwd=tree, check=True, capture_output=True).stdout)
    for path in (tree, *tree.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def main() -> None:
    """The command line; the Makefile's apt-repo calls it."""
    parser = argparse.ArgumentParser(description="Build the repository's keyring package.")
    parser.add_argument("folder", type=Path, help="where the package is written")
    parser.add_argument("--key", action="append", required=True, help="fingerprint; repeat while keys change")
    parser.add_argument("--address", required=True, help="the repository's, as boxes reach it")
    parser.add_argument("--version", help="the changelog's, if nothing is said")
    given = parser.parse_args()
    address = reachable(given.address)
    try:
        version = given.version or from_changelog("Version")
        if subprocess.run(["dpkg", "--validate-version", version], capture_output=True).returncode != 0:
            sys.exit(f"KEYRING_VERSION={version}: no version by Debian's rules; 0.6.0+1 is one")
        given.folder.mkdir(parents=True, exist_ok=True)
        deb = given.folder / f"{NAME}_{version}_all.deb"
        with tempfile.TemporaryDirectory() as tree:
            fill(Path(tree), given.key, address, version)
            environment = {**os.environ, "SOURCE_DATE_EPOCH": from_changelog("Timestamp")}
            build = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", tree, str(deb)]
            subprocess.run(build, check=True, env=environment, capture_output=True)
    except FileNotFoundError as error:
        sys.exit(f"{error.filename} is missing: apt install dpkg-dev gnupg")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]} failed: {error.stderr.decode().strip()}")
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
