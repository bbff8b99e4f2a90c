"""A studio of a desk carried to S3 storage."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import requests
from PIL import Image

from studio_worker.local_studio import LocalStudio, Places, pictures_at
from tests.fakes.machine import PICTURE, Machine, queue
from tests.farm.s3 import S3Server

WAIT_S = 60.0


def test_pictures_are_carried_to_s3(s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    """Results and inputs lie in S3 afterwards, below their prefix, and the folder is as it was."""
    desk = tmp_path / "desk"
    with LocalStudio(desk / "studio.sqlite3") as studio:
        machine = Machine(studio).connect()
        job_id = queue(studio)
        machine.take()
        assert machine.upload(job_id).status_code == 200
        drawn = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(drawn, "GIF")
        given = studio.add_picture(drawn.getvalue())
        machine.hang_up()
    before = {file.name: file.read_bytes() for file in (desk / "pictures").iterdir()}
    there = f"s3://{bucket}/farm"
    options = ["--from", desk, "--database", tmp_path / "new.sqlite3", "--pictures", there]
    done = subprocess.run(
        [sys.executable, "-m", "studio_worker", "local-studio", "carry", *options],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert {file.name: file.read_bytes() for file in (desk / "pictures").iterdir()} == before
    assert len(s3_server.keys(bucket)) == 3
    assert all(key.startswith("farm/") for key in s3_server.keys(bucket))
    with LocalStudio(Places(tmp_path / "new.sqlite3", pictures_at(there))) as studio:
        assert studio.result(job_id) == PICTURE
        answer = requests.get(f"{studio.base_url}{given}", timeout=WAIT_S)
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/gif")
        assert answer.content == drawn.getvalue()
