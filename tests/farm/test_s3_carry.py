"""A studio of a desk carried to S3 storage."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import requests
from PIL import Image

from studio_worker.errors import ConfigError
from studio_worker.local_studio import LocalStudio, Places, pictures_at
from tests.fakes.machine import PICTURE, Machine, queue
from tests.farm.s3 import S3Server
from tests.farm.s3_proxy import S3Proxy

WAIT_S = 60.0


def gif() -> bytes:
    drawn = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(drawn, "GIF")
    return drawn.getvalue()


def worked_at(places: Path | Places) -> tuple[str, str]:
    """Have a studio make a picture, and be given another; returns the job, and the path of what was given."""
    with LocalStudio(places) as studio:
        machine = Machine(studio).connect()
        job_id = queue(studio)
        machine.take()
        assert machine.upload(job_id).status_code == 200
        given = studio.add_picture(gif())
        machine.hang_up()
    return job_id, given


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def carrying(tmp_path: Path, there: str, database: str = "") -> Sequence[str]:
    database = database or str(tmp_path / "new.sqlite3")
    options = ["--from", tmp_path / "desk", "--database", database, "--pictures", there]
    return [sys.executable, "-m", "studio_worker", "local-studio", "carry", *map(str, options)]


def carried(tmp_path: Path, there: str, database: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(carrying(tmp_path, there, database), capture_output=True, text=True, timeout=WAIT_S)


def test_pictures_are_carried_to_s3(s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    """Results and inputs lie in S3 afterwards, below their prefix, and the folder is as it was."""
    job_id, given = worked_at(tmp_path / "desk" / "studio.sqlite3")
    before = contents(tmp_path / "desk" / "pictures")
    there = f"s3://{bucket}/farm"
    done = carried(tmp_path, there)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "desk" / "pictures") == before
    assert len(s3_server.keys(bucket)) == 3
    assert all(key.startswith("farm/") for key in s3_server.keys(bucket))
    with LocalStudio(Places(tmp_path / "new.sqlite3", pictures_at(there))) as studio:
        assert studio.result(job_id) == PICTURE
        answer = requests.get(f"{studio.base_url}{given}", timeout=WAIT_S)
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/gif")
        assert answer.content == gif()


def test_desk_becomes_a_farm_as_the_docs_say(database_url: str, bucket: str, tmp_path: Path) -> None:
    """PostgreSQL and S3 are tried out by a first start; then the desk is carried there, and two processes
    have its pictures.
    """
    job_id, _ = worked_at(tmp_path / "desk" / "studio.sqlite3")
    there = f"s3://{bucket}/farm"
    farm = Places(database_url, pictures_at(there))
    LocalStudio(farm).stop()
    done = carried(tmp_path, there, database_url)
    assert done.returncode == 0, done.stderr
    with LocalStudio(farm) as one, LocalStudio(Places(database_url, pictures_at(there))) as other:
        assert one.result(job_id) == other.result(job_id) == PICTURE
    with LocalStudio(tmp_path / "desk" / "studio.sqlite3") as desk:
        assert desk.result(job_id) == PICTURE


def test_pictures_that_are_in_s3_stay_there(s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    """A desk whose pictures are in S3 already is carried without one being copied; it cannot be started with
    them any more, and says why. To another prefix it is not carried without them.
    """
    there = f"s3://{bucket}/p"
    old, new = (
        Places(tmp_path / file, pictures_at(there)) for file in ("desk/studio.sqlite3", "new.sqlite3")
    )
    job_id, _ = worked_at(old)
    before = s3_server.tags(bucket)
    elsewhere = carried(tmp_path, f"s3://{bucket}/q")
    assert (elsewhere.returncode, "holds none of the studio's pictures" in elsewhere.stderr) == (78, True)
    done = carried(tmp_path, there)
    assert done.returncode == 0, done.stderr
    after = {key: tag for key, tag in s3_server.tags(bucket).items() if key.startswith("p/")}
    assert {key for key in before if before[key] != after[key]} == {"p/studio"}
    for _ in range(2):
        with pytest.raises(ConfigError, match="this studio was carried to another database"):
            LocalStudio(old)
        with LocalStudio(new) as studio:
            assert studio.result(job_id) == PICTURE


class Failing(S3Proxy):
    """Takes the mark and one picture and refuses the next: ``then`` is called before it does."""

    def __init__(self, port: int, then: Callable[[], None]) -> None:
        self._then = then
        super().__init__(port)

    def _count(self, what: str) -> None:
        S3Proxy._count(self, what)
        is_next = what == "PUT" and self.counts["PUT"] > 2
        self.faults.refused = float(is_next)
        if is_next:
            self._then()


@pytest.mark.parametrize("status", [75, 143], ids=["refused", "ended"])
def test_attempt_that_ends_halfway_is_begun_again(
    s3_server: S3Server, bucket: str, tmp_path: Path, status: int
) -> None:
    """Storage that refuses in the middle is exit status 75 with the cure, SIGTERM is 143; neither leaves a
    row or the copy of the file, and what lies in S3 by then the next attempt removes.
    """
    job_id, _ = worked_at(tmp_path / "desk" / "studio.sqlite3")
    there, scratch = f"s3://{bucket}/p", tmp_path / "scratch"
    scratch.mkdir()
    begun: Future[subprocess.Popen[str]] = Future()

    def end() -> None:
        if status == 143:
            begun.result(WAIT_S).terminate()

    with Failing(s3_server.port, end) as proxy:
        environment = os.environ | {"AWS_ENDPOINT_URL_S3": proxy.url, "TMPDIR": str(scratch)}
        with subprocess.Popen(
            carrying(tmp_path, there), stderr=subprocess.PIPE, text=True, env=environment
        ) as attempt:
            begun.set_result(attempt)
            _, said = attempt.communicate(timeout=WAIT_S)
    assert attempt.returncode == status, said
    assert said.count("begin again: nothing was carried") == said.count("\n") == int(status == 75)
    assert list(scratch.iterdir()) == []
    done = carried(tmp_path, there)
    assert done.returncode == 0, done.stderr
    assert len(s3_server.keys(bucket)) == 3
    with LocalStudio(Places(tmp_path / "new.sqlite3", pictures_at(there))) as studio:
        assert studio.result(job_id) == PICTURE
