"""The S3 server of the farm's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from studio_worker.local_studio import LocalStudio
from tests.fakes.machine import Machine
from tests.farm import s3
from tests.farm.s3_proxy import S3Proxy


@pytest.fixture(scope="session")
def s3_server() -> Iterator[s3.S3Server]:
    """An S3 server for this run. Without one installed its tests are skipped; FARM=1 promises one."""
    try:
        server = s3.S3Server()
    except s3.NotInstalled as missing:
        if os.environ.get("FARM"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    with server:
        yield server


@pytest.fixture
def bucket(s3_server: s3.S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket that is this test's alone; the environment says how to get there."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server.bucket()


@pytest.fixture
def proxy(s3_server: s3.S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """What stands between the bucket and whoever looks for it in the environment."""
    with S3Proxy(s3_server.port) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", between.url)
        yield between


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the tries of one request, which are many while a storage is away."""
    monkeypatch.setattr("time.sleep", lambda _seconds: None)


@pytest.fixture
def machine(studio: LocalStudio) -> Iterator[Machine]:
    """A worker of the test's studio."""
    worker = Machine(studio).connect()
    yield worker
    worker.hang_up()
