"""An apt repository on loopback, with a key of its own: made by the commands that a maintainer types."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from tests.acceptance.machine import Machine

ROOT = Path(__file__).parents[2]
KEYRING = "studio-worker-archive-keyring"


class KeyRing:
    """A throw-away GnuPG home with one secret key; a context manager."""

    def __enter__(self) -> Self:
        # Not below the tests' folders: a socket's path has at most 107 characters.
        self.home = tempfile.mkdtemp(prefix="gnupg-")
        self.environment = {**os.environ, "GNUPGHOME": self.home}
        self.key = self.generate("throw-away")
        return self

    def generate(self, name: str) -> str:
        """Another secret key; returns its fingerprint."""
        self.gpg("--passphrase", "", "--quick-generate-key", name, "ed25519", "sign", "never")
        return self._fingerprint(name)

    def generate_expired(self, name: str) -> str:
        """A secret key that is there and signs nothing any more; returns its fingerprint."""
        then = ("--faked-system-time", "20200101T000000!")
        self.gpg(*then, "--passphrase", "", "--quick-generate-key", name, "ed25519", "sign", "1d")
        return self._fingerprint(name)

    def generate_locked(self, name: str) -> str:
        """A secret key whose passphrase nobody types; returns its fingerprint."""
        self.gpg("--pinentry-mode", "loopback", "--passphrase", "secret",
                 "--quick-generate-key", name, "ed25519", "sign", "never")  # fmt: skip
        Path(self.home, "gpg-agent.conf").write_text("pinentry-program /bin/false\n")
        subprocess.run(["gpgconf", "--kill", "all"], env=self.environment, check=True)
        return self._fingerprint(name)

    def _fingerprint(self, name: str) -> str:
        listed = self.gpg("--with-colons", "--list-keys", name).splitlines()
        return next(line.split(":")[9] for line in listed if line.startswith("fpr:"))

    def __exit__(self, *_: object) -> None:
        subprocess.run(["gpgconf", "--kill", "all"], env=self.environment, check=False)
        shutil.rmtree(self.home, ignore_errors=True)

    def gpg(self, *arguments: str) -> str:
        command = ["gpg", "--batch", "--quiet", *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return done.stdout


class Archive:
    """The repository and the server that shows it; a context manager."""

    def __init__(self, folder: Path, keys: KeyRing) -> None:
        self.folder = folder / "repository"
        self.keys = keys
        self._incoming = folder / "incoming"
        self.folder.mkdir()

    def __enter__(self) -> Self:
        handler = functools.partial(_Quiet, directory=str(self.folder))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self, *debs: Path, suite: str = "candidate", check: bool = True, **more: str) -> str:
        """``make apt-repo`` of these packages; returns what it printed, of which stderr is a part."""
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir()
        for deb in debs:
            (self._incoming / deb.name).symlink_to(deb)
        variables = {"URL": self.address, "APT_SUITE": suite, "PACKAGES": self._incoming, **more}
        return self.make("apt-repo", check=check, **variables)

    def make(self, target: str, *, check: bool = True, **variables: Any) -> str:
        """One of the Makefile's commands for this repository and this key."""
        given = {"REPO": self.folder, "KEY": self.keys.key, **variables}
        command = ["make", "--silent", target, *(f"{name}={value}" for name, value in given.items())]
        done = subprocess.run(
            command, cwd=ROOT, env=self.keys.environment, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0 or not check, done.stdout
        return done.stdout

    def subscribe(self, machine: Machine) -> None:
        """What an operator does on a new box; Debian's own archive is out of reach."""
        machine.shell("rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/*")
        machine.copy_in(self.folder / f"{KEYRING}.deb", "/root")
        machine.shell(f"apt-get install -y /root/{KEYRING}.deb && apt-get update")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Nobody reads it."""
