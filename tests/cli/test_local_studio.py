"""`studio-worker local-studio` and its `carry`, as an operator writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from studio_worker.local_studio import LocalStudio, Places, pictures_at
from tests.fakes.machine import PICTURE, Machine, queue

SECRET = "not-for-everybody"


def local_studio(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "studio_worker", "local-studio", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_carry_takes_a_studio_to_another_place(tmp_path: Path) -> None:
    """One command carries everything, says how far it is, and how to go on; a second one is refused."""
    here, file, folder = tmp_path / "here", tmp_path / "there" / "s.sqlite3", tmp_path / "pictures"
    with LocalStudio(here / "studio.sqlite3") as studio:
        machine = Machine(studio).connect()
        done = queue(studio)
        machine.take()
        assert machine.upload(done).status_code == 200
        machine.hang_up()
    command = ("carry", "--from", here, "--database", file, "--pictures", folder)
    carried = local_studio(*command)
    assert (carried.returncode, carried.stderr) == (0, "")
    assert {"pictures: 1 of 1", "jobs: 1", "workers: 1"} < set(carried.stdout.splitlines())
    assert f"start studios with --database {file}" in carried.stdout
    with LocalStudio(Places(file, pictures_at(str(folder)))) as studio:
        assert studio.result(done) == PICTURE
    again = local_studio(*command)
    assert again.returncode == 78
    assert "the database there is not empty" in again.stderr


@pytest.mark.parametrize("words", [(), ("carry", "--from", ".")], ids=["run", "carry"])
@pytest.mark.parametrize(
    "address",
    [
        f"postgresql://studio:{SECRET}@db.example/studio",
        f"postgresql://db.example/studio?user=studio&password={SECRET}",
    ],
)
def test_password_on_the_command_line_is_refused(
    tmp_path: Path, words: tuple[str, ...], address: str
) -> None:
    """A password that ps would show is refused with the places for it, and is not repeated."""
    said = local_studio(*words, "--database", address, "--pictures", tmp_path)
    assert said.returncode == 78
    assert "~/.pgpass" in said.stderr
    assert "PGPASSWORD" in said.stderr
    assert SECRET not in said.stdout + said.stderr


def test_postgresql_wants_a_place_for_pictures() -> None:
    """A database elsewhere has no folder beside it: where pictures go has to be said."""
    said = local_studio("--database", "postgresql://db.example/studio")
    assert said.returncode == 78
    assert "--pictures: " in said.stderr
    assert len(said.stderr.splitlines()) == 1


def test_options_of_the_studio_are_not_lost_before_carry(tmp_path: Path) -> None:
    """What stands before `carry`, and would be without effect, is refused."""
    said = local_studio("--data", tmp_path, "carry", "--from", tmp_path, "--database", tmp_path / "x")
    assert said.returncode == 2
    assert "--data" in said.stderr
    assert not (tmp_path / "x").exists()
