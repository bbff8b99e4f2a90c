"""A studio whose pictures lie in S3 storage: the same to workers and people, also while it is away."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from studio_worker.local_studio import LocalStudio, Places, pictures_at
from studio_worker.local_studio.housekeeping import DAY_S, FOR_EVER, Housekeeping
from studio_worker.local_studio.web.stored import THREADS
from studio_worker.local_studio.web.worker_routes import UPLOADS
from tests.fakes.machine import PICTURE, Machine, queue
from tests.farm.s3 import SECRET, S3Server
from tests.farm.s3_proxy import S3Proxy
from tests.local_studio.test_results import png

WAIT_S = 30.0

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture
def studio(tmp_path: Path, bucket: str, proxy: S3Proxy) -> Iterator[LocalStudio]:
    with LocalStudio(Places(tmp_path / "studio.sqlite3", pictures_at(f"s3://{bucket}/p"))) as running:
        yield running


def pictures_in(server: S3Server, bucket: str) -> list[str]:
    return [key for key in server.keys(bucket) if key != "p/studio"]


def test_result_is_an_object_that_goes_with_its_job(
    studio: LocalStudio, machine: Machine, s3_server: S3Server, bucket: str
) -> None:
    """A result is one object named by its job; people get it from the studio, by Range too, never from S3."""
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id, ext="png").status_code == 200
    (key,) = pictures_in(s3_server, bucket)
    assert key.startswith(f"p/{job_id}-")
    url = f"{studio.base_url}/api/jobs/{job_id}/result"
    whole = requests.get(url, timeout=WAIT_S, allow_redirects=False)
    assert (whole.status_code, whole.content) == (200, PICTURE)
    assert "sandbox" in whole.headers["Content-Security-Policy"]
    assert (whole.headers["Content-Type"], whole.headers["Accept-Ranges"]) == ("image/png", "bytes")
    part = requests.get(url, headers={"Range": "bytes=8-11"}, timeout=WAIT_S)
    assert (part.status_code, part.content) == (206, b"WEBP")
    assert part.headers["Content-Range"] == f"bytes 8-11/{len(PICTURE)}"
    assert requests.get(url, headers={"Range": "bytes=999-"}, timeout=WAIT_S).status_code == 416
    unsure = requests.get(url, headers={"Range": "bytes=8-11", "If-Range": '"older"'}, timeout=WAIT_S)
    assert (unsure.status_code, unsure.content) == (200, PICTURE)
    head = requests.head(url, timeout=WAIT_S)
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(PICTURE)))
    assert requests.delete(f"{studio.base_url}/api/jobs/{job_id}", timeout=WAIT_S).status_code == 204
    assert pictures_in(s3_server, bucket) == []


def test_picture_that_was_taken_away_is_told(
    studio: LocalStudio, machine: Machine, s3_server: S3Server, bucket: str
) -> None:
    """An object that somebody has removed is 404 with a sentence, and its job can still be deleted."""
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id).status_code == 200
    for key in pictures_in(s3_server, bucket):
        s3_server.client().delete_object(Bucket=bucket, Key=key)
    answer = requests.get(f"{studio.base_url}/api/jobs/{job_id}/result", timeout=WAIT_S)
    assert (answer.status_code, "not in the studio's storage" in answer.json()["error"]) == (404, True)
    assert requests.delete(f"{studio.base_url}/api/jobs/{job_id}", timeout=WAIT_S).status_code == 204


def test_storage_that_is_away_costs_no_picture(
    studio: LocalStudio, machine: Machine, proxy: S3Proxy, s3_server: S3Server, bucket: str
) -> None:
    """A worker that delivers meanwhile is asked to come again, and then succeeds; the page works on."""
    done, job_id = queue(studio), queue(studio)
    machine.take()
    assert machine.upload(done).status_code == 200
    assert machine.hear()["claim"]["jobId"] == job_id
    machine.say("accept", jobId=job_id)
    proxy.faults.refused = 1.0
    answer = machine.upload(job_id)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
    assert studio.job(job_id).status == "running"
    for path in ("/", "/api/state", "/api/jobs", "/health/ready"):
        assert requests.get(f"{studio.base_url}{path}", timeout=WAIT_S).status_code == 200
    for path in (f"/api/jobs/{done}/result", "/files/unknown"):
        assert requests.get(f"{studio.base_url}{path}", timeout=WAIT_S).status_code in (503, 404)
    given = requests.post(f"{studio.base_url}/api/files", data=png(), timeout=WAIT_S)
    assert given.status_code == 503
    proxy.faults.refused = 0.0
    assert machine.upload(job_id).status_code == 200
    assert studio.result(job_id) == PICTURE
    assert (studio.job(job_id).completions, studio.job(job_id).attempts) == (1, 1)
    assert len(pictures_in(s3_server, bucket)) == 2


def test_storage_that_hangs_takes_nothing_else_with_it(
    studio: LocalStudio,
    machine: Machine,
    proxy: S3Proxy,
    s3_server: S3Server,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many deliveries wait for a storage that says nothing, the page and the probes answer."""
    job_id = queue(studio)
    machine.take()
    monkeypatch.setattr("tests.fakes.machine.WAIT_S", 2 * WAIT_S)  # 45 at once take their time
    proxy.faults.is_silent = True
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(machine.upload(job_id).status_code))
        for _ in range(45)
    ]
    for thread in threads:
        thread.start()
    assert proxy.wait_for("PUT", UPLOADS + 1, 2 * WAIT_S)  # and that of the start
    for path in ("/", "/api/state", "/health/ready"):
        assert requests.get(f"{studio.base_url}{path}", timeout=WAIT_S).status_code == 200
    proxy.faults.is_silent = False
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [409] * 44
    assert studio.job(job_id).completions == 1
    assert len(pictures_in(s3_server, bucket)) == 1


def test_gallery_whose_storage_hangs_takes_nothing_else_with_it(
    studio: LocalStudio, machine: Machine, proxy: S3Proxy
) -> None:
    """However many pictures wait for a storage that says nothing, the probes and the metrics answer."""
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id).status_code == 200
    proxy.faults.is_silent = True
    url, contents = f"{studio.base_url}/api/jobs/{job_id}/result", list[bytes]()
    threads = [
        threading.Thread(target=lambda: contents.append(requests.get(url, timeout=2 * WAIT_S).content))
        for _ in range(60)
    ]
    for thread in threads:
        thread.start()
    assert proxy.wait_for("GET", THREADS + 1, WAIT_S)  # and that of the start
    for path in ("/", "/api/state", "/health/ready", "/metrics"):
        assert requests.get(f"{studio.base_url}{path}", timeout=WAIT_S).status_code == 200
    proxy.faults.is_silent = False
    for thread in threads:
        thread.join()
    assert contents == [PICTURE] * 60


def test_job_that_is_deleted_while_storage_is_away_is_gone(
    studio: LocalStudio, machine: Machine, proxy: S3Proxy
) -> None:
    """People need not wait for the storage to be rid of a job; what is left of it goes later."""
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id).status_code == 200
    proxy.faults.refused = 1.0
    assert requests.delete(f"{studio.base_url}/api/jobs/{job_id}", timeout=WAIT_S).status_code == 204
    assert requests.get(f"{studio.base_url}/api/jobs/{job_id}", timeout=WAIT_S).status_code == 404


def test_upload_race_leaves_one_object(
    studio: LocalStudio, machine: Machine, s3_server: S3Server, bucket: str
) -> None:
    """Of many deliveries of one job at the same moment one is taken, and the losers' bytes are gone."""
    job_id = queue(studio)
    machine.take()
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(machine.upload(job_id).status_code)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 409, 409, 409]
    assert len(pictures_in(s3_server, bucket)) == 1


def test_what_a_crash_left_goes_after_a_day(
    studio: LocalStudio, machine: Machine, s3_server: S3Server, bucket: str
) -> None:
    """An object without a row stays for a day, since its row may be about to come, and then goes; results and
    inputs stay.
    """
    job_id = queue(studio)
    machine.take()
    assert machine.upload(job_id).status_code == 200
    studio.add_picture(png())
    named = pictures_in(s3_server, bucket)
    s3_server.client().put_object(Bucket=bucket, Key=f"p/{job_id}-0123456789abcdef.png", Body=PICTURE)
    for later_s, left in ((0.0, 3), (DAY_S - 60, 3), (DAY_S + 60, 2)):
        housekeeping = Housekeeping(
            studio.database,
            studio.queue,
            studio.shelf,
            studio.pictures,
            FOR_EVER,
            clock=lambda later_s=later_s: time.time() + later_s,
        )
        housekeeping.keep_house()
        assert len(pictures_in(s3_server, bucket)) == left
    assert pictures_in(s3_server, bucket) == named


@pytest.mark.parametrize(
    ("place", "missing", "said"),
    [
        ("s3://no-such-bucket/p", "", "there is no bucket 'no-such-bucket'"),
        ("s3://no-such-bucket/p", "boto3", "pip install 'studio-worker[farm]'"),
        ("http://somewhere/p", "", "write s3://BUCKET/PREFIX"),
    ],
    ids=["bucket", "library", "form"],
)
def test_command_ends_with_78_and_the_cure(
    tmp_path: Path, s3_server: S3Server, place: str, missing: str, said: str
) -> None:
    """A wrong place for the pictures, or one that needs what is not installed, ends the command at once."""
    options = ["--port=0", f"--data={tmp_path}", f"--pictures={place}"]
    script = (
        "import sys\n"
        + (f"sys.modules[{missing!r}] = None\n" if missing else "")
        + "from studio_worker.cli import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "local-studio", *options],
        env=os.environ | s3_server.environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 78
    assert said in done.stderr
    assert SECRET not in done.stderr


def test_picture_that_breaks_off_is_told_as_broken(
    studio: LocalStudio, machine: Machine, proxy: S3Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the storage breaks off in the middle nobody takes the half for a whole, and it is no fault of the
    studio's that wants a traceback.
    """
    job_id = queue(studio)
    machine.take()
    large = PICTURE * 30_000
    assert machine.upload(job_id, large).status_code == 200
    url = f"{studio.base_url}/api/jobs/{job_id}/result"
    proxy.faults.cut, proxy.faults.cut_after_bytes = 1.0, (200_000,)
    with pytest.raises(requests.RequestException):
        requests.get(url, timeout=WAIT_S)
    assert proxy.counts["cut"] == 1
    proxy.faults.cut = 0.0
    assert requests.get(url, timeout=WAIT_S).content == large
    assert [record.message for record in caplog.records if record.exc_info] == []
