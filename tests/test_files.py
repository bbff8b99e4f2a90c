"""Files that are whole or not there, and the lock on a state folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from studio_worker.box.state_lock import state_lock
from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.files import fsync_directory, remove_temporaries, write_atomic

ROOT = Path(__file__).parents[1]

HOLD = """
import sys
from pathlib import Path
from studio_worker.box.state_lock import state_lock
with state_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the state folder; it has it when this returns."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


# --- writing ---


def test_write_atomic_replaces_the_content(tmp_path: Path) -> None:
    """After a write the file holds the new content and nothing else is left in the folder."""
    path = tmp_path / "identity.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_is_private_unless_told_otherwise(tmp_path: Path) -> None:
    """A file is for this user alone, also where it replaces one that others could read."""
    path = tmp_path / "identity.json"
    path.write_bytes(b"old")
    path.chmod(0o644)
    write_atomic(path, b"secret")
    assert path.stat().st_mode & 0o777 == 0o600
    write_atomic(path, b"ledger", mode=0o644)
    assert path.stat().st_mode & 0o077 == 0o044 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_write_atomic_takes_the_longest_name(tmp_path: Path) -> None:
    """A name as long as the file system allows can be written."""
    path = tmp_path / ("n" * 255)
    write_atomic(path, b"x")
    assert path.read_bytes() == b"x"


def test_write_atomic_leaves_no_trace_of_a_failure(tmp_path: Path) -> None:
    """Where the target cannot be replaced, the error comes out and no temporary file stays."""
    path = tmp_path / "taken"
    (path / "below").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_atomic(path, b"x")
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_keeps_the_old_content_where_the_disk_is_full(tmp_path: Path) -> None:
    """A write that fails half-way leaves the old content whole."""
    path = tmp_path / "ledger.json"
    write_atomic(path, b"old")
    script = """
import resource, signal, sys
from pathlib import Path
from studio_worker.files import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    write_atomic(Path(sys.argv[1]), b"n" * 4096)
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "File too large" in done.stdout, done.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_remove_temporaries_clears_what_a_kill_left(tmp_path: Path) -> None:
    """What a killed write left is cleared away; every other file stays."""
    script = """
import os, signal, sys
from pathlib import Path
from studio_worker.files import write_atomic
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_atomic(Path(sys.argv[1]), b"new")
"""
    path = tmp_path / "ledger.json"
    path.write_bytes(b"old")
    killed = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_fsync_directory_wants_a_folder(tmp_path: Path) -> None:
    """Asking for a folder's safety with a file is an error, not a silent nothing."""
    fsync_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        fsync_directory(tmp_path / "file")


# --- the lock ---


def test_state_lock_refuses_a_second_process(tmp_path: Path) -> None:
    """While one service holds a state folder, another is refused with the cure, and may try again: the first
    may be one that was killed and hangs in a driver.
    """
    with holder(tmp_path) as first:
        with (
            pytest.raises(StateUnavailable, match=r"in use by a running service; .*systemctl stop") as caught,
            state_lock(tmp_path),
        ):
            pytest.fail("the lock was given twice")
        assert caught.value.exit_status == 75
        assert first.poll() is None
        assert first.stdin is not None
        first.stdin.close()
        first.wait(10)
    with state_lock(tmp_path):
        pass


def test_state_lock_ends_with_its_process(tmp_path: Path) -> None:
    """A service that was killed leaves no lock behind."""
    with holder(tmp_path) as process:
        process.kill()
        process.wait(10)
        with state_lock(tmp_path):
            pass


def test_state_lock_is_free_after_use(tmp_path: Path) -> None:
    """The folder can be taken again once it was let go, also after an error."""
    with pytest.raises(ZeroDivisionError), state_lock(tmp_path):
        raise ZeroDivisionError
    with state_lock(tmp_path):
        pass


def test_state_locks_of_two_folders_do_not_meet(tmp_path: Path) -> None:
    """Two services with a state folder each run side by side."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with holder(tmp_path / "a") as process, state_lock(tmp_path / "b"):
        assert process.poll() is None
        process.kill()


def test_state_lock_that_cannot_be_opened_names_the_file(tmp_path: Path) -> None:
    """A lock file that cannot be opened is a configuration error naming it, not a crash."""
    (tmp_path / "lock").mkdir()
    with pytest.raises(ConfigError, match="cannot be opened") as caught, state_lock(tmp_path):
        pytest.fail("a lock without a file")
    assert caught.value.source == str(tmp_path / "lock")
