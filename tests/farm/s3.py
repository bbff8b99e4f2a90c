"""An S3 server of the tests' own: OpenStack Swift with its S3 interface, from Debian's packages.

It is a real one: it checks signatures, ends presigned addresses in time and takes uploads in parts, which
mere imitations do not. All its servers are one process that starts in a few seconds, as any user; what it
stores it finds again after :meth:`S3Server.kill`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import boto3
from botocore.config import Config

from tests.fakes.servers import free_port

WAIT_S = 60.0
USER, SECRET, REGION = "test:studio", "testing-secret", "us-east-1"
"""As swift_node.py has them."""
_PYTHON = "/usr/bin/python3"
_NODE = Path(__file__).with_name("swift_node.py")
_PROGRAM = Path("/usr/bin/swift-proxy-server")


class NotInstalled(Exception):
    """This machine has no Swift."""

    def __init__(self) -> None:
        packages = "swift-proxy swift-account swift-container swift-object"
        super().__init__(f"no S3 server: as root, apt-get install --no-install-recommends {packages}")


class NotStarted(Exception):
    """The server ended; the text ends with what it said last."""


class S3Server:
    """One server with its disk, started at once; ends, and is removed, with the ``with`` block."""

    def __init__(self) -> None:
        if not _PROGRAM.is_file():
            raise NotInstalled
        self._folder = Path(tempfile.mkdtemp(prefix="s3-", dir=_with_attributes()))
        self._process: subprocess.Popen[bytes] | None = None
        self._made = 0
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def environment(self, url: str = "", **more: str) -> dict[str, str]:
        """What a program needs to use it, and nothing of this machine's own.

        Args:
            url: of a proxy before it.
        """
        said = {
            "AWS_ENDPOINT_URL_S3": url or self.url,
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        return said | more

    def client(self) -> Any:
        """A client of its own administrator."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=USER,
            aws_secret_access_key=SECRET,
            region_name=REGION,
            config=Config(
                request_checksum_calculation="when_required", response_checksum_validation="when_required"
            ),
        )

    def bucket(self) -> str:
        """A new empty bucket; returns its name."""
        self._made += 1
        name = f"bucket-{self._made}"
        self.client().create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str) -> list[str]:
        """What lies in it."""
        return list(self.tags(bucket))

    def tags(self, bucket: str) -> dict[str, str]:
        """The same with the tag of each: what tells one content from another."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        entries = (entry for page in pages for entry in page.get("Contents", ()))
        return {entry["Key"]: entry["ETag"].strip('"') for entry in entries}

    def start(self) -> None:
        """Run the server; returns when it takes requests. Raises NotStarted."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                # The signal comes when the thread ends that started it, so that must be one that stays.
                ["setpriv", "--pdeathsig=KILL", _PYTHON, str(_NODE), str(self._folder), str(self.port)],
                cwd=self._folder,
                env={"PATH": os.environ.get("PATH", os.defpath)},  # not the tests' own Python modules
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        said: IO[bytes] | None = self._process.stdout
        assert said is not None
        if not said.readline():
            raise NotStarted(f"Swift did not start: {(self._folder / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(WAIT_S)
            if self._process.stdout is not None:
                self._process.stdout.close()

    def close(self) -> None:
        """End it and remove its files."""
        self.kill()
        shutil.rmtree(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _with_attributes() -> str:
    """A folder of a file system that takes extended attributes of users, which Swift needs."""
    for folder in (tempfile.gettempdir(), "/var/tmp"):
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            try:
                os.setxattr(probe.name, "user.probe", b"x")
            except OSError:
                continue
            return folder
    raise NotStarted("no temporary folder takes extended attributes, in which Swift keeps what it knows")
