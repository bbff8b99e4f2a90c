"""What may be asked for, where, and what of an address is never told."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

from studio_worker.download import download_file, fetch_bytes
from studio_worker.errors import DownloadError
from studio_worker.report.logs import facts
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer, refused_url
from tests.lab.downloads import (
    BIG,
    BODY,
    QUICK,
    Waits,
    warnings,
)


@pytest.mark.parametrize(
    "url",
    [
        "http://models.example/model.bin",
        "http://models.example\\@127.0.0.1/model.bin",
        "http://127.0.0.1@models.example/model.bin",
        "ftp://127.0.0.1/model.bin",
        "file:///etc/passwd",
        "http://[::1/model.bin",
        "http:///model.bin",
        "model.bin",
        "",
    ],
)
def test_download_refuses_addresses_that_are_not_allowed(
    tmp_path: Path, logged: pytest.LogCaptureFixture, url: str
) -> None:
    """Only https, and plain http on this machine, is ever asked; a refusal is final."""
    waits = Waits()

    with pytest.raises(DownloadError) as failure:
        download_file(url, tmp_path / "m", policy=Policy(wait=waits))

    assert failure.value.reason == "request error"
    assert "is " in str(failure.value)  # the rule, not a failed connection
    assert waits.seconds == []
    assert len(warnings(logged)) == 1


def test_download_follows_redirects(server: FileServer, tmp_path: Path) -> None:
    """A redirect to an allowed address, on another host too, is followed, and remembered for the rest."""
    file = server.serve("/model.bin", BIG, drop_after=600_000)
    there = f"http://localhost:{server.port}/model.bin"
    entry = server.serve("/entry", b"", redirect=there)
    relative = server.serve("/relative", b"", redirect="entry")

    dest = download_file(relative.url, tmp_path / "m", sha256=file.sha256, policy=QUICK)

    assert dest.read_bytes() == BIG
    assert [asked.range for asked in file.requests] == [None, "bytes=600000-"]
    assert file.requests[0].headers["host"] == f"localhost:{server.port}"
    assert len(entry.requests) == 1


@pytest.mark.parametrize(
    "target",
    ["http://192.0.2.1/model.bin", "file:///etc/passwd", "http://192.0.2.1\\@127.0.0.1/", "http://["],
)
def test_download_refuses_a_redirect_to_a_forbidden_address(
    server: FileServer, tmp_path: Path, target: str
) -> None:
    """Where a redirect leads is judged before it is asked, and a refusal is final."""
    file = server.serve("/model.bin", BODY, redirect=target)

    with pytest.raises(DownloadError, match="redirected to") as failure:
        download_file(file.url, tmp_path / "m", policy=Policy(connect_s=0.5, delays_s=(0, 0)))

    assert failure.value.reason == "request error"
    assert "Timeout" not in str(failure.value)
    assert len(file.requests) == 1


def test_download_ends_a_redirect_loop(server: FileServer, tmp_path: Path) -> None:
    """Redirects that lead nowhere end in an error."""
    file = server.serve("/loop", BODY, redirect="/loop")

    with pytest.raises(DownloadError, match="redirects"):
        download_file(file.url, tmp_path / "m", policy=QUICK)

    assert len(file.requests) == 11


@pytest.mark.parametrize(
    "fault",
    [
        {"answers": [(404, {})]},
        {"redirect": "http://192.0.2.1/x?key=hunter2hunter2"},
        {"no_length": True},
        {"declared_extra": 5, "ranges": False},
        {},
    ],
)
def test_download_never_tells_the_secrets_of_an_address(
    server: FileServer, tmp_path: Path, logged: pytest.LogCaptureFixture, fault: dict[str, Any]
) -> None:
    """Query string and user info are sent to the server, and stand in no error, traceback or log line."""
    file = server.serve("/model.bin", BODY, **fault)
    secret_url = file.url.replace("http://", "http://worker:hunter2hunter2@") + "?key=hunter2hunter2#hunter2"
    told = ""

    try:
        download_file(secret_url, tmp_path / "m", policy=QUICK)
    except DownloadError:
        told = traceback.format_exc()

    assert "key=hunter2hunter2" in file.requests[0].path
    assert "authorization" in file.requests[0].headers
    lines = [f"{record.getMessage()} {facts(record)}" for record in logged.records]
    assert len(lines) >= 2
    assert "hunter2" not in told + "".join(lines)


def test_unreachable_server_is_told_without_the_secrets_of_its_address(tmp_path: Path) -> None:
    """An error of the connection quotes no secret, and neither does its traceback."""
    url = refused_url().replace("http://", "http://worker:hunter2hunter2@") + "?key=hunter2hunter2"
    told = ""

    try:
        download_file(url, tmp_path / "m", policy=QUICK)
    except DownloadError:
        told = traceback.format_exc()

    assert "Connection refused" in told
    assert "hunter2" not in told


def test_fetch_bytes_never_tells_the_secrets_of_an_address() -> None:
    """An input picture's address is as secret as a model's."""
    url = refused_url("/a?key=hunter2hunter2")
    told = ""

    try:
        fetch_bytes(url, max_bytes=1000, policy=QUICK)
    except DownloadError:
        told = traceback.format_exc()

    assert "Connection refused" in told
    assert "hunter2" not in told


def test_download_sends_no_credentials_to_the_host_it_is_redirected_to(
    server: FileServer, tmp_path: Path
) -> None:
    """User info of an address goes to that host alone."""
    file = server.serve("/model.bin", BODY)
    entry = server.serve("/entry", b"", redirect=f"http://localhost:{server.port}/model.bin")

    download_file(entry.url.replace("http://", "http://worker:hunter2@"), tmp_path / "m")

    assert "authorization" in entry.requests[0].headers
    assert "authorization" not in file.requests[0].headers
