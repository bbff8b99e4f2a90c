"""What several connections promise: the same bytes, each fetched about once, whatever the server does."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker.download import Policy, download_file
from studio_worker.errors import DownloadError
from tests.servers import FileServer, ServedFile

LARGE = random.Random(2).randbytes(24 * 1024 * 1024)
SHA256 = hashlib.sha256(LARGE).hexdigest()
QUICK = Policy(connect_s=5, stall_s=5, delays_s=(0.0, 0.0, 0.0))
PACE = 6_000_000
"""Bytes a second of one connection, where a test wants several of them."""
KILLS = int(os.environ.get("DOWNLOAD_TEST_KILLS", "8"))

CHILD = """
import sys
from pathlib import Path
from studio_worker.download import download_file
def tell(done, total):
    print(done, flush=True)
download_file(sys.argv[1], Path(sys.argv[2]), sha256=sys.argv[3], progress=tell)
"""


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


def slow(server: FileServer, **faults: Any) -> ServedFile:
    """A file whose every connection is slow, so that more of them pay."""
    return server.serve("/model.bin", LARGE, rate=PACE, **faults)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("is_hash_known", [True, False])
def test_download_uses_more_connections_where_they_bring_more(
    server: FileServer, tmp_path: Path, is_hash_known: bool
) -> None:
    """Where the server slows each connection down, several fetch one file, and few bytes come twice."""
    file = slow(server)

    download_file(file.url, tmp_path / "m", sha256=SHA256 if is_hash_known else None, policy=QUICK)

    assert (tmp_path / "m").read_bytes() == LARGE
    assert len(file.requests) > 2
    assert all(asked.headers["if-range"] == file.current_etag() for asked in file.requests[1:])
    assert file.bytes_sent < 1.3 * len(LARGE)
    assert files_in(tmp_path) == {"m"}


def test_download_stays_with_one_connection_where_it_may_use_no_more(
    server: FileServer, tmp_path: Path
) -> None:
    """The largest number of connections is the operator's to set."""
    file = server.serve("/model.bin", LARGE)

    policy = Policy(max_connections=1)
    assert download_file(file.url, tmp_path / "m", sha256=SHA256, policy=policy).read_bytes() == LARGE

    assert [asked.range for asked in file.requests] == [None]
    assert file.bytes_sent == len(LARGE)


@pytest.mark.parametrize(
    "fault",
    [
        {"ranges": False},
        {"range_shift": 7},
        {"range_cap": 1_000_000},
        {"bare_ranges": True},
        {"etag": None},
        {"drop_after": 5_000_000},
        {"range_answers": [(429, {"Retry-After": "1"}), (503, {}), (416, {})]},
        {"range_answers": [(403, {})] * 40},
    ],
    ids=["ignored", "wrong-range", "short-ranges", "bare", "no-validator", "drop", "busy", "refused"],
)
def test_download_is_right_whatever_becomes_of_its_ranges(
    server: FileServer, tmp_path: Path, fault: dict[str, Any]
) -> None:
    """A server that ignores, cuts, shifts, drops or refuses ranges still gives the file."""
    file = slow(server, **fault)

    download_file(file.url, tmp_path / "m", sha256=SHA256, policy=QUICK)

    assert (tmp_path / "m").read_bytes() == LARGE
    assert file.bytes_sent < 2.2 * len(LARGE)
    assert files_in(tmp_path) == {"m"}


def test_download_never_mixes_two_versions_of_a_file(server: FileServer, tmp_path: Path) -> None:
    """A file that changes while several connections fetch it is fetched whole in its new version."""
    file = slow(server)
    changed = LARGE[::-1]
    file.on_request = lambda earlier: setattr(file, "content", changed) if earlier == 2 else None

    download_file(file.url, tmp_path / "m", policy=QUICK)

    assert (tmp_path / "m").read_bytes() == changed


def test_download_replaces_a_connection_that_is_silent(server: FileServer, tmp_path: Path) -> None:
    """One connection without a byte is not waited for: another fetches what it would have brought."""
    file = slow(server, hold_request=2)

    policy = Policy(stall_s=1.0, slow_s=0.5, delays_s=(0.0,))
    download_file(file.url, tmp_path / "m", sha256=SHA256, policy=policy)

    assert (tmp_path / "m").read_bytes() == LARGE
    assert file.held.is_set()


def test_download_finds_a_flipped_byte_and_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    """A wrong byte is found by the hash; after a second fetch by one connection it is an error."""
    file = slow(server, flip_at=9_000_000)

    with pytest.raises(DownloadError) as failure:
        download_file(file.url, tmp_path / "m", sha256=SHA256, policy=QUICK)

    assert failure.value.reason == "sha256 mismatch"
    assert files_in(tmp_path) == set()


def test_download_loses_little_to_kills(server: FileServer, tmp_path: Path) -> None:
    """Killed at any moment, a download goes on with nearly all of its bytes and shows no wrong file."""
    chance = random.Random(3)
    dest = tmp_path / "m"
    file = slow(server)
    for _ in range(KILLS):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, file.url, str(dest), SHA256], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for _ in range(chance.randrange(1, 14)):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert not dest.exists() or dest.read_bytes() == LARGE
        dest.unlink(missing_ok=True)

    download_file(file.url, dest, sha256=SHA256, policy=QUICK)

    assert dest.read_bytes() == LARGE
    assert files_in(tmp_path) == {"m"}


def test_kept_pieces_are_not_fetched_again(server: FileServer, tmp_path: Path) -> None:
    """What several connections have brought out of order is used by the next call."""
    file = slow(server)
    cancel = threading.Event()

    def stop(done: int, _: int | None) -> None:
        if done > len(LARGE) // 2:
            cancel.set()

    with pytest.raises(DownloadError):
        download_file(file.url, tmp_path / "m", sha256=SHA256, progress=stop, cancel=cancel, policy=QUICK)
    (note,) = tmp_path.rglob("*.json")
    assert json.loads(note.read_text())["total"] == len(LARGE)
    file.bytes_sent = 0

    download_file(file.url, tmp_path / "m", sha256=SHA256, policy=QUICK)

    assert (tmp_path / "m").read_bytes() == LARGE
    assert file.bytes_sent < 0.8 * len(LARGE)
