"""Something else answers in the place of S3, or S3 refuses: no page counts as a picture, none is lost."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import requests

from studio_worker.errors import ConfigError
from studio_worker.local_studio import LocalStudio, Places, pictures_at
from studio_worker.local_studio.pictures.s3 import PART_BYTES, S3
from tests.fakes.machine import PICTURE, Machine, queue
from tests.farm.s3 import S3Server
from tests.farm.s3_proxy import WELCOME, S3Proxy, answer, refusal
from tests.local_studio.test_results import png

WAIT_S = 30.0
_HTML = "Content-Type: text/html"
LOGIN = answer("302 Found", b"", "Location: https://portal.example/login")
SAME_SIZE = answer("200 OK", b"<html></html>".ljust(len(PICTURE)), _HTML)
NOT_FOUND = answer("404 Not Found", b"<!doctype html><p>Not found<br>nginx", _HTML)
GONE = refusal("404 Not Found", "NoSuchKey")
FULL = refusal("507 Insufficient Storage", "InsufficientStorage")
UNENDED = f"HTTP/1.1 200 OK\r\n{_HTML}\r\nConnection: close\r\n\r\n<!doctype html><p>Welcome".encode()

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture
def studio(
    tmp_path: Path, bucket: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalStudio]:
    with LocalStudio(Places(tmp_path / "studio.sqlite3", pictures_at(f"s3://{bucket}/p"))) as running:
        # All lines are looked at, however many there are in a minute.
        monkeypatch.setattr(logging.getLogger("studio_worker.local_studio.web.app"), "filters", [])
        yield running


def delivered(studio: LocalStudio, machine: Machine) -> str:
    """The address of a result."""
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id).status_code == 200
    return f"{studio.base_url}/api/jobs/{job_id}/result"


def as_copied(server: S3Server, bucket: str) -> None:
    """Make of all objects what ``aws s3 sync`` makes of a backup: the same bytes, and no more."""
    for key in server.keys(bucket):
        content = server.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        server.client().put_object(Bucket=bucket, Key=key, Body=content)


@pytest.mark.parametrize("is_copied", [False, True], ids=["put", "copied"])
def test_page_in_the_place_of_s3_is_no_picture(
    studio: LocalStudio,
    machine: Machine,
    proxy: S3Proxy,
    s3_server: S3Server,
    bucket: str,
    caplog: pytest.LogCaptureFixture,
    is_copied: bool,
) -> None:
    """Whoever asks for a picture gets 503, which no browser keeps, and the log one line for each; afterwards
    the picture is there as before.
    """
    result, given = delivered(studio, machine), studio.base_url + studio.add_picture(png())
    if is_copied:
        as_copied(s3_server, bucket)
    for page in (WELCOME, SAME_SIZE, UNENDED, NOT_FOUND, LOGIN):
        caplog.clear()
        proxy.faults.instead = page
        asked = [
            requests.get(result, timeout=WAIT_S),
            requests.get(result, headers={"Range": "bytes=0-3"}, timeout=WAIT_S),
            requests.head(result, timeout=WAIT_S),
            requests.get(given, timeout=WAIT_S),
        ]
        assert {(said.status_code, said.headers["Cache-Control"]) for said in asked} == {(503, "no-store")}
        lines = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert [(line.message, line.exc_info) for line in lines] == [("storage away", None)] * 4
        assert all("something else answers" in line.__dict__["error"] for line in lines)
    proxy.faults.instead = b""
    assert requests.get(result, timeout=WAIT_S).content == PICTURE


def test_pictures_of_a_backup_are_read(
    studio: LocalStudio, machine: Machine, s3_server: S3Server, bucket: str
) -> None:
    """Objects that another program copied to S3 do not say their names; they are served all the same, and by
    Range.
    """
    result, given = delivered(studio, machine), studio.add_picture(png())
    as_copied(s3_server, bucket)
    assert requests.get(result, timeout=WAIT_S).content == PICTURE
    part = requests.get(result, headers={"Range": "bytes=8-11"}, timeout=WAIT_S)
    assert (part.status_code, part.content) == (206, b"WEBP")
    assert requests.get(studio.base_url + given, timeout=WAIT_S).content == png()


@pytest.mark.parametrize("size_bytes", [len(PICTURE), PART_BYTES + 1], ids=["whole", "parts"])
def test_picture_that_s3_did_not_take_is_not_lost(
    studio: LocalStudio, machine: Machine, proxy: S3Proxy, caplog: pytest.LogCaptureFixture, size_bytes: int
) -> None:
    """The worker is told that it is away or full, keeps its picture, and delivers it when S3 takes it again.
    A person is told as well, and the log in one line each.
    """
    job_id, picture = queue(studio), PICTURE.ljust(size_bytes)
    machine.take()
    for said, status in (
        (WELCOME, 503),
        (UNENDED, 503),
        (LOGIN, 503),
        (GONE, 503),  # of a bucket that was removed
        (FULL, 507),
        (refusal("403 Forbidden", "QuotaExceeded"), 507),
    ):
        caplog.clear()
        proxy.faults.instead = said
        assert machine.upload(job_id, picture).status_code == status
        given = requests.post(f"{studio.base_url}/api/files", data=png(), timeout=WAIT_S)
        assert given.status_code == status
        lines = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert [line.exc_info for line in lines] == [None, None]
        assert studio.job(job_id).status == "running"
    proxy.faults.instead = b""
    assert machine.upload(job_id, picture).status_code == 200
    assert studio.result(job_id) == picture
    assert studio.job(job_id).completions == 1


def test_job_is_deleted_whatever_answers(studio: LocalStudio, machine: Machine, proxy: S3Proxy) -> None:
    """A person is rid of a job also where its picture is gone already, or S3 cannot be asked."""
    for said in (WELCOME, LOGIN, GONE):
        job = delivered(studio, machine).removesuffix("/result")
        proxy.faults.instead = said
        assert requests.delete(job, timeout=WAIT_S).status_code == 204
        assert requests.get(job, timeout=WAIT_S).status_code == 404
        proxy.faults.instead = b""


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        (WELCOME, 78, "what answers there is no S3 storage, or the object p/studio is another program's"),
        (UNENDED, 78, "what answers there is no S3 storage"),
        (NOT_FOUND, 78, "what answers there is no S3 storage"),
        (LOGIN, 78, "what answers there is no S3 storage (GetObject: 302); see where AWS_ENDPOINT_URL_S3"),
        (refusal("301 Moved Permanently", "PermanentRedirect"), 78, "name its region in AWS_REGION"),
        (refusal("403 Forbidden", "SignatureDoesNotMatch"), 78, "a region is named in AWS_REGION"),
        (FULL, 75, "the S3 storage is full"),
        (refusal("403 Forbidden", "QuotaExceeded"), 75, "make room there, or raise its quota"),
        (answer("200 OK", b"0" * 64)[:-1], 75, "the S3 storage does not answer"),
    ],
    ids=["welcome", "unended", "not-found", "login", "region", "signature", "full", "quota", "cut"],
)
def test_what_answers_in_the_place_of_s3_is_told_at_the_start(
    bucket: str, proxy: S3Proxy, said: bytes, status: int, words: str
) -> None:
    """A web page, a redirect, another region, a full storage or half a mark has its cure, and is never called
    another studio's.
    """
    proxy.faults.instead = said
    with pytest.raises(ConfigError) as caught:
        S3(f"s3://{bucket}/p").check("mine")
    assert (caught.value.exit_status, caught.value.key) == (status, "--pictures")
    assert words in str(caught.value)
    assert "another studio" not in str(caught.value)


def test_redirect_ends_the_command_in_one_line(tmp_path: Path, bucket: str, proxy: S3Proxy) -> None:
    """Where everything is redirected the command ends with 78 and says what to do, and not where botocore
    gave up.
    """
    proxy.faults.instead = LOGIN
    options = ["--port=0", f"--data={tmp_path}", f"--pictures=s3://{bucket}/p"]
    done = subprocess.run(
        [sys.executable, "-m", "studio_worker", "local-studio", *options],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 78
    assert "no S3 storage" in done.stderr
    assert done.stderr.count("\n") == 1


def test_clock_that_is_wrong_is_told_as_what_may_pass(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is an hour late hears of its clock, and tries again by itself."""
    late = datetime.now(UTC) - timedelta(hours=1)
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda: late.replace(tzinfo=None))
    with pytest.raises(ConfigError, match="set the clock of this machine") as caught:
        S3(f"s3://{bucket}/p").check("mine")
    assert caught.value.exit_status == 75
