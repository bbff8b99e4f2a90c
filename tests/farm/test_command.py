"""The command on PostgreSQL, and the backup that docs/farm.md describes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from studio_worker.local_studio import LocalStudio, Places, places_of
from studio_worker.local_studio.pictures import Folder
from studio_worker.local_studio.places import open_places
from tests.fakes.machine import PICTURE, Machine, queue
from tests.farm.front import Front
from tests.farm.postgres import Cluster, programs

WAIT_S = 60


def studio_worker(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "studio_worker", *map(str, words)]


def test_command_runs_a_studio_on_postgresql(database_url: str, tmp_path: Path) -> None:
    """--database and --pictures are enough: scripts queue jobs, and a restart has them still."""
    command = studio_worker(
        "local-studio",
        "--port",
        0,
        "--data",
        tmp_path / "data",
        "--database",
        database_url,
        "--pictures",
        tmp_path,
    )
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as studio:
            assert studio.stdout is not None
            address = studio.stdout.readline().rpartition(" ")[2].strip()
            assert "with --models DIR" in studio.stdout.readline(), "there is no data folder to have them in"
            submitted = subprocess.run(
                studio_worker("submit", "a red potion", "-m", "placeholder", "--studio", address),
                capture_output=True,
                text=True,
                timeout=WAIT_S,
            )
            assert submitted.returncode == 0, submitted.stderr
            studio.send_signal(signal.SIGTERM)
            _, said = studio.communicate(timeout=WAIT_S)
        assert studio.returncode == 0
        assert "Traceback" not in said
    with LocalStudio(Places(database_url, Folder(tmp_path))) as again:
        assert [job.model for job in again.jobs()] == ["placeholder", "placeholder"]
    assert not (tmp_path / "data" / "studio.sqlite3").exists()


def test_submit_waits_for_a_database_that_goes_in_the_middle(postgres: Cluster, tmp_path: Path) -> None:
    """A database that goes while orders are queued, and comes back, costs none of them, and doubles none."""
    name, count = postgres.create(), 200
    with Front() as front:
        front.serve([postgres.port])
        places = Places(f"postgresql://studio@127.0.0.1:{front.port}/{name}", Folder(tmp_path))
        with LocalStudio(places) as studio:
            command = studio_worker(
                "submit", "x", "-m", "placeholder", "-n", count, "--studio", studio.base_url
            )
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as submitted:
                studio.wait_for(lambda: studio.queue.counts()["queued"] >= 3, WAIT_S)
                front.cut()
                assert submitted.stderr is not None
                assert " since " in submitted.stderr.readline()
                front.serve([postgres.port])
                out, said = submitted.communicate(timeout=WAIT_S)
            assert submitted.returncode == 0, said
            assert out.splitlines() == [f"{job.job_id} queued" for job in studio.jobs(limit=1000)[::-1]]
            assert studio.queue.counts()["queued"] == count
    postgres.drop(name)


def test_backup_of_a_studio_at_work_is_a_studio(postgres: Cluster, database_url: str, tmp_path: Path) -> None:
    """pg_dump and a copy of the pictures, taken while a studio runs, make a studio in another database: jobs,
    pictures and approved workers are there.
    """
    dump = tmp_path / "studio.dump"
    with LocalStudio(Places(database_url, Folder(tmp_path / "pictures"))) as studio:
        machine = Machine(studio).connect()
        done = queue(studio)
        machine.take()
        assert machine.upload(done).status_code == 200
        waiting = queue(studio)
        command = [programs() / "pg_dump", "--format=custom", f"--file={dump}", database_url]
        subprocess.run(command, check=True, timeout=WAIT_S)
        shutil.copytree(tmp_path / "pictures", tmp_path / "copy")
        queue(studio)
        machine.hang_up()
    restored = postgres.url(postgres.create())
    command = [programs() / "pg_restore", "--no-owner", f"--dbname={restored}", dump]
    subprocess.run(command, check=True, timeout=WAIT_S)
    with LocalStudio(Places(restored, Folder(tmp_path / "copy"))) as studio:
        assert studio.result(done) == PICTURE
        machine.turn_to(studio).connect()
        assert machine.take()["jobId"] == waiting
        machine.hang_up()


def test_studio_is_carried_to_postgresql_and_s3(
    database_url: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command takes a SQLite studio and its pictures to PostgreSQL and S3, where it goes on at once."""
    # The local studio's own tests, in the same run, have files stand for databases.
    monkeypatch.setattr("studio_worker.local_studio.studio.open_places", open_places)
    with LocalStudio(tmp_path / "studio.sqlite3") as studio:
        machine = Machine(studio).connect()
        done = queue(studio)
        machine.take()
        assert machine.upload(done).status_code == 200
        waiting = queue(studio)
        machine.hang_up()
    there = ("--database", database_url, "--pictures", f"s3://{bucket}/studio")
    carried = subprocess.run(
        studio_worker("local-studio", "carry", "--from", tmp_path, *there),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert (carried.returncode, carried.stderr) == (0, "")
    with LocalStudio(places_of(tmp_path, database_url, f"s3://{bucket}/studio")) as studio:
        assert studio.result(done) == PICTURE
        machine.turn_to(studio).connect()
        assert machine.take()["jobId"] == waiting
        assert machine.upload(waiting).status_code == 200
        machine.hang_up()
