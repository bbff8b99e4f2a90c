"""`studio-worker local-studio` and its `carry`, as an operator writes them."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from studio_worker.local_studio import LocalStudio, Places, pictures_at
from tests.fakes.machine import PICTURE, Machine, queue
from tests.fakes.servers import free_port

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
    (here / "models").mkdir()
    command = ("carry", "--from", here, "--database", file, "--pictures", folder)
    carried = local_studio(*command)
    assert (carried.returncode, carried.stderr) == (0, "")
    assert {"pictures: 1 of 1", "jobs: 1", "workers: 1"} < set(carried.stdout.splitlines())
    assert f"start studios with --database {file} --pictures {folder}" in carried.stdout
    assert f"--models {here / 'models'}" in carried.stdout
    with LocalStudio(Places(file, pictures_at(str(folder)))) as studio:
        assert studio.result(done) == PICTURE
    again = local_studio(*command)
    assert again.returncode == 78
    assert "the database there is not empty" in again.stderr


def test_carry_without_room_for_its_copy_says_where(tmp_path: Path) -> None:
    """The copy that is carried from needs room: what has none is named, with how to have another."""
    LocalStudio(tmp_path / "studio.sqlite3").stop()
    command = [
        "carry",
        "--from",
        tmp_path,
        "--database",
        tmp_path / "new.sqlite3",
        "--pictures",
        tmp_path / "new",
    ]
    said = subprocess.run(
        [sys.executable, "-m", "studio_worker", "local-studio", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert said.returncode == 75, said.stderr
    assert said.stderr.startswith(f"studio-worker: {tmp_path}: --from: its file cannot be copied to ")
    assert "make room there, or name another folder in TMPDIR" in said.stderr
    assert not (tmp_path / "new.sqlite3").exists()


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


def test_disk_without_room_is_told_as_what_may_pass(tmp_path: Path) -> None:
    """A studio on a full disk is not to be moved away: room is asked for, and a later start goes on."""
    LocalStudio(tmp_path / "studio.sqlite3").stop()
    said = subprocess.run(
        [sys.executable, "-m", "studio_worker", "local-studio", "--port", "0", "--data", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    assert said.returncode == 75
    assert "make room on its disk" in said.stderr
    assert "move the file" not in said.stderr
    LocalStudio(tmp_path / "studio.sqlite3").stop()


@pytest.mark.parametrize(
    ("words", "status", "cure"),
    [
        (("--database", ""), 78, "name a file"),
        (("--database", "/tmp"), 78, "name it with --data"),
        (("--database", "postgresql://studio@host:port/db"), 78, "write postgresql://USER@HOST/NAME"),
        (("--database", "postgresql://studio@[::1/db"), 78, "write postgresql://USER@HOST/NAME"),
        (("--database", "mysql://studio@host/db"), 78, "write postgresql://USER@HOST/NAME"),
        (("--database", "postgresql:/host/db"), 78, "write postgresql://USER@HOST/NAME"),
        (("--keep-gb", "inf"), 2, "from 0 to"),
        (("--keep-days", "nan"), 2, "from 0 to"),
        (("--keep-days", "1e308"), 2, "from 0 to"),
    ],
    ids=["none", "folder", "port", "bracket", "mysql", "slash", "inf", "nan", "days"],
)
def test_option_that_means_nothing_is_a_clear_mistake(
    tmp_path: Path, words: tuple[str, str], status: int, cure: str
) -> None:
    """What no studio can be started with is one message, with what to write instead."""
    said = local_studio("--port", "0", "--data", tmp_path, *words)
    assert said.returncode == status
    assert cure in " ".join(said.stderr.split())
    assert "Traceback" not in said.stderr


def test_database_and_storage_that_are_away_may_come_back(tmp_path: Path) -> None:
    """Where nothing listens the status says that a later start may succeed, and no credentials are blamed."""
    port = free_port()
    pytest.importorskip("psycopg")
    said = local_studio("--database", f"postgresql://studio@127.0.0.1:{port}/db", "--pictures", tmp_path)
    assert (said.returncode, "see that the server runs" in said.stderr) == (75, True), said.stderr
    pytest.importorskip("boto3")
    said = local_studio(
        "--data", tmp_path, "--pictures", "s3://bucket/prefix", AWS_MAX_ATTEMPTS="1",
        AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{port}",
    )  # fmt: skip
    assert (said.returncode, "does not answer" in said.stderr) == (75, True), said.stderr


@pytest.mark.parametrize("has_terminal", [False, True], ids=["service", "terminal"])
def test_sighup_ends_what_lost_its_terminal_alone(tmp_path: Path, has_terminal: bool) -> None:
    """SIGHUP without a certificate is told in the log and does nothing; a closed terminal ends the studio."""
    command = [sys.executable, "-m", "studio_worker", "local-studio", "--port", "0", "--data", str(tmp_path)]
    controller, terminal = os.openpty()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=(lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)) if has_terminal else None,
    ) as studio:
        os.close(terminal)
        assert studio.stdout is not None
        assert studio.stderr is not None
        assert "local studio" in studio.stdout.readline()
        studio.send_signal(signal.SIGHUP)
        assert "SIGHUP without effect" in studio.stderr.readline()
        os.close(controller)
        if not has_terminal:
            studio.send_signal(signal.SIGTERM)
        studio.communicate(timeout=60)
    assert studio.returncode == 0


@pytest.mark.parametrize("content", ["one token, long enough\nand another", "\ufeffone token, long enough"])
def test_token_that_no_header_can_carry_is_refused(tmp_path: Path, content: str) -> None:
    """A token of two lines, or with a mark that no editor shows, is refused by the name of its file."""
    token = tmp_path / "token"
    token.write_text(content)
    token.chmod(0o600)
    said = local_studio("--port", "0", "--data", tmp_path, "--token-file", token)
    assert said.returncode == 78
    assert f"{token}: holds more than one line" in said.stderr
