"""What the downloader promises: the right bytes or none, few of them twice, and a reason when it fails."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker.download import download_file, ensure_file, fetch_bytes
from studio_worker.errors import DownloadCancelled, DownloadError
from studio_worker.report.logs import facts
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer, raw_server, refused_url
from tests.lab.downloads import (
    BIG,
    BODY,
    BODY_SHA256,
    QUICK,
    TRUNCATED,
    files_in,
    leave_part,
    model_file,
    staged,
    warnings,
)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="studio_worker")
    return caplog


# --- upstream's promises ---


def test_download_file_writes_the_served_bytes(server: FileServer, tmp_path: Path) -> None:
    """A download holds exactly the bytes that were served, and leaves nothing else behind."""
    file = server.serve("/model.bin", BODY)
    dest = tmp_path / "models" / "model.bin"

    assert download_file(file.url, dest) == dest

    assert dest.read_bytes() == BODY
    assert list(dest.parent.iterdir()) == [dest]


def test_ensure_file_accepts_a_matching_sha256(server: FileServer, tmp_path: Path) -> None:
    """A file whose bytes match the registry's hash is kept."""
    file = server.serve("/verified.gguf", BODY)

    path = ensure_file(tmp_path, model_file("verified.gguf", file.url, BODY_SHA256))

    assert path.read_bytes() == BODY


def test_ensure_file_rejects_a_sha256_mismatch_and_caches_nothing(server: FileServer, tmp_path: Path) -> None:
    """Tampered bytes never become a model file, and none of them is kept."""
    file = server.serve("/tampered.gguf", b"evil bytes")

    with pytest.raises(DownloadError, match="sha256") as failure:
        ensure_file(tmp_path, model_file("tampered.gguf", file.url, BODY_SHA256), policy=QUICK)

    assert failure.value.reason == "sha256 mismatch"
    assert files_in(tmp_path) == set()
    assert len(file.requests) == 1


def test_ensure_file_is_case_insensitive_about_the_expected_hash(server: FileServer, tmp_path: Path) -> None:
    """A hash in capital letters means the same hash."""
    file = server.serve("/upper.gguf", BODY)

    assert ensure_file(tmp_path, model_file("upper.gguf", file.url, BODY_SHA256.upper())).is_file()
    assert download_file(file.url, tmp_path / "again", sha256=BODY_SHA256.upper()).is_file()


def test_download_file_surfaces_a_non_success_status(server: FileServer, tmp_path: Path) -> None:
    """A refused file is an error that names the status; it is asked for once and leaves no file."""
    file = server.serve("/missing.gguf", BODY, answers=[(404, {})])

    with pytest.raises(DownloadError, match="404") as failure:
        download_file(file.url, tmp_path / "missing.gguf", policy=QUICK)

    assert failure.value.status == 404
    assert len(file.requests) == 1
    assert files_in(tmp_path) == set()


def test_download_surfaces_a_connection_level_failure_and_caches_nothing(tmp_path: Path) -> None:
    """A server that cannot be reached is an error before any status, and leaves no file."""
    with pytest.raises(DownloadError, match=r"^GET ") as failure:
        download_file(refused_url(), tmp_path / "refused.gguf", policy=QUICK)

    assert failure.value.reason == "request error"
    assert failure.value.status is None
    assert files_in(tmp_path) == set()


def test_download_rejects_a_truncated_body_and_caches_nothing(tmp_path: Path) -> None:
    """A body shorter than declared never becomes a file; without a hash no byte of it is kept."""
    with raw_server(TRUNCATED) as base, pytest.raises(DownloadError, match="streaming body") as failure:
        download_file(f"{base}/truncated.gguf", tmp_path / "truncated.gguf", policy=QUICK)

    assert failure.value.reason == "streaming body"
    assert files_in(tmp_path) == set()


def test_truncated_download_emits_a_warn_breadcrumb(tmp_path: Path, logged: pytest.LogCaptureFixture) -> None:
    """A truncated download ends with one warning that says so."""
    with raw_server(TRUNCATED) as base, pytest.raises(DownloadError):
        download_file(f"{base}/short.gguf", tmp_path / "short.gguf", policy=QUICK)

    (record,) = warnings(logged)
    assert record.message == "download failed: streaming body"
    assert facts(record)["op"] == "download"
    assert facts(record)["elapsed_ms"] >= 0
    assert "status" not in facts(record)


def test_download_failure_emits_a_warn_breadcrumb_with_status(
    server: FileServer, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """A refused download ends with one warning that names URL, place and status."""
    file = server.serve("/gone.gguf", BODY, answers=[(404, {})])
    dest = tmp_path / "gone.gguf"

    with pytest.raises(DownloadError):
        download_file(file.url, dest, policy=QUICK)

    (record,) = warnings(logged)
    assert record.message == "download failed: non-success status"
    assert record.levelno == logging.WARNING
    told = facts(record)
    assert (told["op"], told["url"], told["dest"], told["status"]) == ("download", file.url, str(dest), 404)
    assert told["elapsed_ms"] >= 0


def test_connection_level_failure_emits_a_warn_breadcrumb(
    tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """An unreachable server ends with one warning, however often it was tried."""
    with pytest.raises(DownloadError):
        download_file(refused_url(), tmp_path / "refused.gguf", policy=QUICK)

    (record,) = warnings(logged)
    assert record.message == "download failed: request error"
    assert facts(record)["op"] == "download"
    assert "elapsed_ms" in facts(record)


def test_sha256_mismatch_emits_a_warn_breadcrumb(
    server: FileServer, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """Wrong bytes end with one warning that says which check they failed."""
    file = server.serve("/tampered.gguf", b"evil bytes")

    with pytest.raises(DownloadError):
        ensure_file(tmp_path, model_file("tampered.gguf", file.url, BODY_SHA256))

    (record,) = warnings(logged)
    assert record.message == "download failed: sha256 mismatch"
    assert facts(record)["op"] == "download"


def test_ensure_file_downloads_when_missing_then_reuses_the_cache(server: FileServer, tmp_path: Path) -> None:
    """A file that is here costs no request."""
    file = server.serve("/once.gguf", BODY)

    first = ensure_file(tmp_path, model_file("once.gguf", file.url))
    second = ensure_file(tmp_path, model_file("once.gguf", file.url))

    assert first == second
    assert first.read_bytes() == BODY
    assert len(file.requests) == 1


# --- the cached file ---


def test_ensure_file_replaces_a_damaged_cached_file(server: FileServer, tmp_path: Path) -> None:
    """A file on disk that does not match its hash is fetched anew."""
    file = server.serve("/model.bin", BODY)
    (tmp_path / "model.bin").write_bytes(b"a tiny pretend modem")

    assert ensure_file(tmp_path, model_file("model.bin", file.url, BODY_SHA256)).read_bytes() == BODY


# --- cancel ---


@pytest.mark.parametrize("fault", [{"hold_head": True}, {"hold_after": 0}, {"hold_after": 300_000}])
def test_download_ends_soon_when_cancelled(
    server: FileServer, tmp_path: Path, logged: pytest.LogCaptureFixture, fault: dict[str, Any]
) -> None:
    """A stop does not wait for a silent server; what has come is kept, and it is no failure."""
    file = server.serve("/model.bin", BIG, **fault)
    cancel = threading.Event()
    ended = []

    def download() -> None:
        with pytest.raises(DownloadCancelled):
            download_file(file.url, tmp_path / "m", sha256=file.sha256, cancel=cancel)
        ended.append(time.monotonic())

    thread = threading.Thread(target=download)
    thread.start()
    assert file.held.wait(10)
    cancelled = time.monotonic()
    cancel.set()
    thread.join(10)

    assert ended[0] - cancelled < 2
    assert warnings(logged) == []
    assert not (tmp_path / "m").exists()


def test_download_ends_soon_when_cancelled_between_two_tries(server: FileServer, tmp_path: Path) -> None:
    """A stop does not wait for the next try."""
    file = server.serve("/model.bin", BODY, answers=[(503, {"Retry-After": "60"})])
    cancel = threading.Event()

    def cancel_and_wait(event: threading.Event, seconds: float) -> bool:
        cancel.set()
        return event.wait(seconds)

    with pytest.raises(DownloadCancelled):
        download_file(file.url, tmp_path / "m", cancel=cancel, policy=Policy(wait=cancel_and_wait))

    assert files_in(tmp_path) == set()


def test_download_keeps_its_bytes_when_cancelled_while_it_reads_them_back(
    server: FileServer, tmp_path: Path
) -> None:
    """A stop while kept bytes are hashed does not lose them."""
    file = server.serve("/model.bin", BIG)
    leave_part(file, tmp_path / "m", 600_000, sha256=file.sha256)
    cancel = threading.Event()
    cancel.set()

    with pytest.raises(DownloadCancelled):
        download_file(file.url, tmp_path / "m", sha256=file.sha256, cancel=cancel)

    assert staged(tmp_path).stat().st_size == 600_000
    assert len(file.requests) == 1


# --- what is visible, and when ---


def test_download_shows_nothing_under_the_final_name_before_it_is_verified(
    server: FileServer, tmp_path: Path
) -> None:
    """A reader of the folder sees the whole file or none, and never a part beside it."""
    file = server.serve("/model.bin", BIG, drop_after=300_000)
    folder = tmp_path / "models"
    seen: set[str] = set()
    file.on_request = lambda _: seen.update(path.name for path in folder.iterdir())

    def look(*_: int | None) -> None:
        seen.update(path.name for path in folder.iterdir())

    download_file(file.url, folder / "model.bin", sha256=file.sha256, progress=look, policy=QUICK)

    assert seen == {".staging"}
    assert files_in(folder) == {"model.bin"}


def test_download_leaves_an_earlier_file_alone_until_the_new_one_is_whole(
    server: FileServer, tmp_path: Path
) -> None:
    """A failed download does not touch the file that was there."""
    file = server.serve("/model.bin", b"evil bytes")
    dest = tmp_path / "model.bin"
    dest.write_bytes(BODY)

    with pytest.raises(DownloadError):
        download_file(file.url, dest, sha256=BODY_SHA256, policy=QUICK)

    assert dest.read_bytes() == BODY


# --- the log of a good one ---


def test_download_logs_start_and_end(
    server: FileServer, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """A good download is two lines: where from and where to, then how much in what time."""
    file = server.serve("/model.bin", BODY)
    dest = tmp_path / "model.bin"

    download_file(file.url, dest)

    start, end = logged.records
    common = {"op": "download", "url": file.url, "dest": str(dest)}
    assert (start.message, end.message) == ("download starting", "download done")
    assert facts(start).items() >= common.items()
    told = facts(end)
    assert told.items() >= (common | {"bytes": len(BODY), "resumed_from": 0, "connections": 1}).items()
    assert told["elapsed_ms"] >= 0


def test_download_reports_progress_up_to_the_whole(server: FileServer, tmp_path: Path) -> None:
    """Whoever watches sees rising byte counts, kept bytes included, and the whole length."""
    file = server.serve("/model.bin", BIG)
    leave_part(file, tmp_path / "m", 600_000, sha256=file.sha256)
    seen: list[tuple[int, int | None]] = []

    download_file(
        file.url, tmp_path / "m", sha256=file.sha256, progress=lambda done, total: seen.append((done, total))
    )

    assert seen[0][0] == 600_000
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (len(BIG), len(BIG))


# --- small files into memory ---


def test_fetch_bytes_returns_the_body(server: FileServer) -> None:
    """An input picture comes as it is served."""
    file = server.serve("/input.png", BODY)

    assert fetch_bytes(file.url, max_bytes=len(BODY), policy=QUICK) == BODY


@pytest.mark.parametrize("fault", [{"hold_after": 0}, {"chunked": True}, {"no_length": True}])
def test_fetch_bytes_refuses_more_than_its_limit(server: FileServer, fault: dict[str, Any]) -> None:
    """A picture larger than allowed is refused, by its declared length or when it has grown too large."""
    file = server.serve("/input.png", BIG, **fault)

    with pytest.raises(DownloadError, match="larger than 1000 bytes") as failure:
        fetch_bytes(file.url, max_bytes=1000, policy=QUICK)

    assert failure.value.reason == "size mismatch"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"answers": [(404, {})]}, "non-success status"),
        ({"answers": [(304, {})]}, "non-success status"),
        ({"declared_extra": 5}, "streaming body"),
        ({"redirect": "http://192.0.2.1/"}, "request error"),
    ],
)
def test_fetch_bytes_fails_as_a_download_does(server: FileServer, fault: dict[str, Any], reason: str) -> None:
    """An input that cannot be had whole is an error with the download's reasons."""
    file = server.serve("/input.png", BODY, **fault)

    with pytest.raises(DownloadError) as failure:
        fetch_bytes(file.url, max_bytes=1000, policy=QUICK)

    assert failure.value.reason == reason


def test_fetch_bytes_can_be_cancelled(server: FileServer) -> None:
    """A stop does not wait for a silent server's picture."""
    file = server.serve("/input.png", BODY, hold_after=3)
    cancel = threading.Event()

    def cancel_when_held() -> None:
        assert file.held.wait(10)
        cancel.set()

    canceller = threading.Thread(target=cancel_when_held)
    canceller.start()

    with pytest.raises(DownloadCancelled):
        fetch_bytes(file.url, max_bytes=1000, policy=Policy(), cancel=cancel)

    canceller.join()


def test_pretend_model_has_upstreams_hash() -> None:
    """The bytes used here are those of upstream's tests."""
    assert hashlib.sha256(BODY).hexdigest() == BODY_SHA256
