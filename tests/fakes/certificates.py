"""Certificates of 127.0.0.1 as a test needs them: of an authority of their own, valid when it likes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

_CONFIG = """\
[ca]
default_ca = here
[here]
database = index
serial = serial
new_certs_dir = .
default_md = sha256
policy = names
[names]
commonName = supplied
"""


class Certificate(NamedTuple):
    """Files: the authority to believe in, what a server shows, and its key."""

    authority: Path
    shown: Path
    key: Path


def certificate(
    folder: Path, not_before: str = "20200101000000Z", not_after: str = "20990101000000Z"
) -> Certificate:
    """One that is valid now, or between two times that are given. Skips the test without openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates with")
    (folder / "ca.cnf").write_text(_CONFIG)
    (folder / "index").touch()
    (folder / "serial").write_text("01")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    fresh_key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    for command in (
        f"req -x509 {fresh_key} -days 30 -subj /CN=authority -keyout ca.key -out ca.pem",
        f"req {fresh_key} -subj /CN=models -keyout key.pem -out request",
        "ca -config ca.cnf -batch -notext -in request -cert ca.pem -keyfile ca.key -out cert.pem"
        f" -startdate {not_before} -enddate {not_after} -extfile names",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return Certificate(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
