"""What the downloader promises: the right bytes or none, few of them twice, and a reason when it fails."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from studio_worker.download import download_file, ensure_file, fetch_bytes
from studio_worker.errors import DownloadCancelled, DownloadError
from studio_worker.models import ModelFile
from studio_worker.report.logs import facts
from studio_worker.transfer.policy import Policy
from tests.servers import FileServer, ServedFile, raw_server, refused_url

BODY = b"a tiny pretend model"
BODY_SHA256 = "7820645b979bcfe59530fcd3b377c10e20bffed93396b8b3ffbd506f06aaacfe"
BIG = random.Random(1).randbytes(1_000_000)
TRUNCATED = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nonly a few bytes"

QUICK = Policy(connect_s=5, stall_s=5, delays_s=(0.0, 0.0, 0.0))
"""Tries again as often as in life, without the waits."""

CHILD = """
import json, sys
from pathlib import Path
from studio_worker.download import download_file
url, dest, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
print("started", flush=True)
download_file(url, dest, progress=lambda done, total: print(done, flush=True), **options)
print("done", flush=True)
"""


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="studio_worker")
    return caplog


def model_file(filename: str, url: str, sha256: str | None = None) -> ModelFile:
    return ModelFile(role="model", url=url, filename=filename, sha256=sha256)


def warnings(logged: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in logged.records if record.levelno >= logging.WARNING]


def files_in(folder: Path) -> set[str]:
    """Every file below ``folder``, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def staged(folder: Path) -> Path:
    """The one kept part below ``folder``."""
    (part,) = folder.rglob("*.part")
    return part


def start_child(file: ServedFile, dest: Path, **options: Any) -> subprocess.Popen[str]:
    arguments = [file.url, str(dest), json.dumps(options)]
    return subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)


def await_line(child: subprocess.Popen[str], is_wanted: Callable[[str], bool]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if is_wanted(line.strip()):
            return
    pytest.fail("the process ended before it got so far")


def await_bytes(child: subprocess.Popen[str], count: int) -> None:
    await_line(child, lambda line: line.isdecimal() and int(line) >= count)


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def leave_part(file: ServedFile, dest: Path, count: int, **options: Any) -> None:
    """Cancel a download of ``file`` when ``count`` bytes have come, the server is well afterwards."""
    cancel = threading.Event()
    file.hold_after = count

    def stop(done: int, _: int | None) -> None:
        if done == count:
            cancel.set()

    with pytest.raises(DownloadCancelled):
        download_file(file.url, dest, cancel=cancel, progress=stop, policy=QUICK, **options)
    assert file.held.wait(10)
    file.hang_up()
    assert staged(dest.parent).stat().st_size == count


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


# --- sizes and lengths ---


def test_download_refuses_a_file_of_another_size_before_its_bytes(
    server: FileServer, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """A declared length that differs from the size asked for is an error at once."""
    file = server.serve("/model.bin", BIG, hold_after=0)

    with pytest.raises(DownloadError) as failure:
        download_file(file.url, tmp_path / "model.bin", size=len(BIG) - 1, policy=QUICK)

    assert failure.value.reason == "size mismatch"
    assert [record.message for record in warnings(logged)] == ["download failed: size mismatch"]
    assert files_in(tmp_path) == set()


def test_download_stops_a_body_that_outgrows_its_size(server: FileServer, tmp_path: Path) -> None:
    """A body of unknown length cannot fill the disk beyond the size asked for."""
    file = server.serve("/model.bin", BIG, chunked=True, hold_after=500_000)

    with pytest.raises(DownloadError) as failure:
        download_file(file.url, tmp_path / "model.bin", size=1000, policy=QUICK)

    assert failure.value.reason == "size mismatch"
    assert files_in(tmp_path) == set()


def test_download_refuses_a_body_whose_end_cannot_be_known(server: FileServer, tmp_path: Path) -> None:
    """Without length, size and hash a broken file would look whole, so it is refused."""
    file = server.serve("/model.bin", BODY, no_length=True)

    with pytest.raises(DownloadError, match="neither") as failure:
        download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert failure.value.reason == "size mismatch"
    assert len(file.requests) == 1


@pytest.mark.parametrize("known", [{"sha256": BODY_SHA256}, {"size": len(BODY)}])
def test_download_takes_a_body_without_length_where_hash_or_size_is_known(
    server: FileServer, tmp_path: Path, known: dict[str, Any]
) -> None:
    """A server that declares no length is good enough where the file can be checked otherwise."""
    file = server.serve("/model.bin", BODY, no_length=True)

    assert download_file(file.url, tmp_path / "model.bin", policy=QUICK, **known).read_bytes() == BODY


def test_download_notices_a_break_where_no_length_is_declared(server: FileServer, tmp_path: Path) -> None:
    """A connection that ends early without a length never makes a file, and is tried once more."""
    file = server.serve("/model.bin", BIG, no_length=True, drop_after=400_000, ranges=False)

    with pytest.raises(DownloadError) as failure:
        download_file(file.url, tmp_path / "model.bin", sha256=file.sha256, policy=QUICK)

    assert failure.value.reason == "sha256 mismatch"
    assert len(file.requests) == 2
    assert files_in(tmp_path) == set()


def test_download_reads_chunked_bodies(server: FileServer, tmp_path: Path) -> None:
    """A chunked body is a file like any other."""
    file = server.serve("/model.bin", BIG, chunked=True)

    assert download_file(file.url, tmp_path / "model.bin", policy=QUICK).read_bytes() == BIG


def test_download_rejects_a_chunked_body_that_breaks(server: FileServer, tmp_path: Path) -> None:
    """A chunked body without its last chunk never becomes a file."""
    file = server.serve("/model.bin", BIG, chunked=True, drop_after=100_000, ranges=False, etag=None)

    with pytest.raises(DownloadError) as failure:
        download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert failure.value.reason == "streaming body"
    assert files_in(tmp_path) == set()


def test_download_refuses_an_encoded_body(server: FileServer, tmp_path: Path) -> None:
    """Compressed bytes are not taken for the file's own."""
    file = server.serve("/model.bin", BODY, extra_headers={"Content-Encoding": "gzip"})

    with pytest.raises(DownloadError, match="gzip"):
        download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert len(file.requests) == 1


@pytest.mark.parametrize("coding", ["", "aws-chunked", "UTF-8", "none", "binary, identity"])
def test_download_leaves_it_to_the_hash_where_a_coding_is_none(
    server: FileServer, tmp_path: Path, coding: str
) -> None:
    """A header that names no coding of HTTP does not stop a file whose hash is known and right."""
    file = server.serve("/model.bin", BODY, extra_headers={"Content-Encoding": coding})

    download_file(file.url, tmp_path / "model.bin", sha256=BODY_SHA256, policy=QUICK)

    assert (tmp_path / "model.bin").read_bytes() == BODY


def test_download_refuses_a_coding_where_no_hash_is_known(server: FileServer, tmp_path: Path) -> None:
    """What the server says is not the file's own bytes is not taken on its word."""
    file = server.serve("/model.bin", BODY, extra_headers={"Content-Encoding": "aws-chunked"})

    with pytest.raises(DownloadError, match="aws-chunked"):
        download_file(file.url, tmp_path / "model.bin", policy=QUICK)


@pytest.mark.parametrize("status", [204, 206, 300, 304])
def test_download_takes_no_other_answer_for_the_file(server: FileServer, tmp_path: Path, status: int) -> None:
    """Only a 200, or a range that was asked for, is a file."""
    file = server.serve("/model.bin", BODY, answers=[(status, {})])

    with pytest.raises(DownloadError, match=str(status)):
        download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert files_in(tmp_path) == set()


# --- resuming ---


@pytest.mark.parametrize("bare_ranges", [True, False])
@pytest.mark.parametrize("is_hash_known", [True, False])
def test_download_outlasts_a_server_that_drops_every_connection(
    server: FileServer, tmp_path: Path, is_hash_known: bool, bare_ranges: bool
) -> None:
    """A mirror that closes after every 70 kB is outlasted, and no byte is fetched twice."""
    file = server.serve("/model.bin", BIG, drop_after=70_000, bare_ranges=bare_ranges)
    sha256 = file.sha256 if is_hash_known else None

    dest = download_file(file.url, tmp_path / "model.bin", sha256=sha256, policy=QUICK)

    assert dest.read_bytes() == BIG
    assert file.bytes_sent == len(BIG)
    assert len(file.requests) == 15


def test_download_gives_up_on_a_server_that_drops_and_cannot_resume(
    server: FileServer, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """Bytes that are fetched again and again are no progress: the download ends with an error."""
    file = server.serve("/model.bin", BIG, drop_after=70_000, ranges=False)

    with pytest.raises(DownloadError, match="streaming body"):
        download_file(file.url, tmp_path / "model.bin", sha256=file.sha256, policy=QUICK)

    assert len(file.requests) < 20
    assert len(warnings(logged)) == 1


def test_download_takes_a_range_that_was_cut_short_as_one_step(server: FileServer, tmp_path: Path) -> None:
    """A server may answer a range with less than asked; the file is still whole in the end."""
    file = server.serve("/model.bin", BIG, drop_after=300_000, range_cap=300_000)

    dest = download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert dest.read_bytes() == BIG
    assert file.bytes_sent == len(BIG)


@pytest.mark.parametrize("is_hash_known", [True, False])
def test_download_resumes_in_a_later_call(
    server: FileServer, tmp_path: Path, logged: pytest.LogCaptureFixture, is_hash_known: bool
) -> None:
    """What an earlier call has kept is not fetched again, and the log says how much that was."""
    file = server.serve("/model.bin", BIG)
    dest = tmp_path / "model.bin"
    options: dict[str, Any] = {"sha256": file.sha256} if is_hash_known else {}
    leave_part(file, dest, 600_000, **options)
    file.bytes_sent = 0

    download_file(file.url, dest, policy=QUICK, **options)

    assert dest.read_bytes() == BIG
    assert file.requests[-1].range == "bytes=600000-"
    guard = None if is_hash_known else file.current_etag()  # nodes of a CDN differ in their tags
    assert file.requests[-1].headers.get("if-range") == guard
    assert file.bytes_sent == 400_000
    assert facts(logged.records[-1])["resumed_from"] == 600_000
    assert files_in(tmp_path) == {"model.bin"}


def test_download_resumes_after_a_kill(server: FileServer, tmp_path: Path) -> None:
    """A process killed in the middle loses nothing: the next fetches only the rest."""
    file = server.serve("/model.bin", BIG, hold_after=600_000)
    dest = tmp_path / "model.bin"
    child = start_child(file, dest, sha256=file.sha256)
    await_bytes(child, 600_000)
    assert file.held.wait(10)
    kill(child)
    file.hang_up()
    assert not dest.exists()

    download_file(file.url, dest, sha256=file.sha256, policy=QUICK)

    assert dest.read_bytes() == BIG
    assert file.bytes_sent == len(BIG)
    assert file.requests[-1].range == "bytes=600000-"


def test_download_resumes_from_another_address_of_the_same_content(
    server: FileServer, tmp_path: Path
) -> None:
    """Kept bytes belong to the content: another mirror can go on where the first stopped."""
    first = server.serve("/one/model.bin", BIG)
    second = server.serve("/two/model.bin", BIG, etag='"another"')
    leave_part(first, tmp_path / "model.bin", 600_000, sha256=first.sha256)

    dest = download_file(second.url, tmp_path / "model.bin", sha256=first.sha256, policy=QUICK)

    assert dest.read_bytes() == BIG
    assert second.bytes_sent == 400_000
    assert "if-range" not in second.requests[0].headers


def test_download_resumes_where_every_answer_has_another_etag(server: FileServer, tmp_path: Path) -> None:
    """The nodes of a CDN have tags of their own: what is put together is judged by its hash."""
    file = server.serve("/model.bin", BIG, drop_after=300_000)
    file.on_request = lambda earlier: setattr(file, "etag", f'"node-{earlier}"')

    download_file(file.url, tmp_path / "model.bin", sha256=file.sha256, policy=QUICK)

    assert (tmp_path / "model.bin").read_bytes() == BIG
    assert file.bytes_sent == len(BIG)


def test_download_goes_on_where_a_range_comes_as_a_whole_answer(server: FileServer, tmp_path: Path) -> None:
    """A 200 whose Content-Range is the one that was asked for is that range; the hash decides."""
    file = server.serve("/model.bin", BIG, range_status=200)
    leave_part(file, tmp_path / "model.bin", 600_000, sha256=file.sha256)

    download_file(file.url, tmp_path / "model.bin", sha256=file.sha256, policy=QUICK)

    assert (tmp_path / "model.bin").read_bytes() == BIG
    assert file.bytes_sent == len(BIG)


def test_download_takes_no_part_for_the_whole(server: FileServer, tmp_path: Path) -> None:
    """A 200 that says it is a part of the file is not the file, where nothing else would tell."""
    file = server.serve("/model.bin", BIG, range_status=200)
    leave_part(file, tmp_path / "model.bin", 600_000)

    download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert (tmp_path / "model.bin").read_bytes() == BIG


def test_download_resumes_by_date_where_there_is_no_etag(server: FileServer, tmp_path: Path) -> None:
    """A date that is old enough to stand for one content guards a resume too."""
    file = server.serve("/model.bin", BIG, etag=None, last_modified=1_700_000_000)
    leave_part(file, tmp_path / "model.bin", 600_000)

    download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert file.requests[-1].headers["if-range"] == "Tue, 14 Nov 2023 22:13:20 GMT"
    assert file.requests[-1].range == "bytes=600000-"


@pytest.mark.parametrize(
    "validators",
    [{"etag": None}, {"etag": 'W/"weak"'}, {"etag": None, "last_modified": time.time() + 3600}],
    ids=["none", "weak-etag", "fresh-date"],
)
def test_download_starts_over_where_nothing_vouches_for_the_kept_bytes(
    server: FileServer, tmp_path: Path, validators: dict[str, Any]
) -> None:
    """Without a hash and a strong validator nothing is put together from two answers."""
    file = server.serve("/model.bin", BIG, drop_after=600_000, **validators)
    file.on_request = lambda earlier: setattr(file, "drop_after", None) if earlier else None

    dest = download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert dest.read_bytes() == BIG
    assert [asked.range for asked in file.requests] == [None, None]


@pytest.mark.parametrize("validators", [{}, {"etag": None, "last_modified": 1_700_000_000}])
def test_download_notices_a_file_that_changed_between_two_requests(
    server: FileServer, tmp_path: Path, validators: dict[str, Any]
) -> None:
    """Halves of two versions are never put together: the new version is fetched whole."""
    file = server.serve("/model.bin", BIG, **validators)
    leave_part(file, tmp_path / "model.bin", 600_000)
    file.content = BIG[::-1]
    if validators:
        file.last_modified = 1_700_000_001

    dest = download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert dest.read_bytes() == BIG[::-1]


def test_download_notices_another_length_behind_the_same_etag(server: FileServer, tmp_path: Path) -> None:
    """A server that forgets to change its ETag is found out by the length."""
    file = server.serve("/model.bin", BIG, etag='"never changes"')
    leave_part(file, tmp_path / "model.bin", 600_000)
    file.content = BIG[::-1] + b"!"

    dest = download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert dest.read_bytes() == BIG[::-1] + b"!"


def test_download_notices_a_shorter_file_behind_the_same_etag(server: FileServer, tmp_path: Path) -> None:
    """Kept bytes that reach beyond the end of the file are not taken for the file."""
    file = server.serve("/model.bin", BIG, etag='"never changes"')
    leave_part(file, tmp_path / "model.bin", 600_000)
    file.content = BIG[:500_000]

    dest = download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert dest.read_bytes() == BIG[:500_000]


def test_download_replaces_kept_bytes_that_are_damaged(server: FileServer, tmp_path: Path) -> None:
    """A byte that flipped on disk is found by the final hash, and the file is fetched again whole."""
    file = server.serve("/model.bin", BIG)
    dest = tmp_path / "model.bin"
    leave_part(file, dest, 600_000, sha256=file.sha256)
    with staged(tmp_path).open("r+b") as part:
        part.seek(1234)
        part.write(bytes([BIG[1234] ^ 1]))

    download_file(file.url, dest, sha256=file.sha256, policy=QUICK)

    assert dest.read_bytes() == BIG
    assert file.requests[-1].range is None


@pytest.mark.parametrize("length", [len(BIG), len(BIG) + 5])
@pytest.mark.parametrize("size", [None, len(BIG)])
def test_download_replaces_a_whole_part_that_is_damaged(
    server: FileServer, tmp_path: Path, length: int, size: int | None
) -> None:
    """Kept bytes that leave nothing to ask for, and are wrong, are fetched again in the same call."""
    file = server.serve("/model.bin", BIG)
    dest = tmp_path / "model.bin"
    leave_part(file, dest, 600_000, sha256=file.sha256)
    staged(tmp_path).write_bytes(b"x" * length)

    download_file(file.url, dest, sha256=file.sha256, size=size, policy=QUICK)

    assert dest.read_bytes() == BIG


@pytest.mark.parametrize("is_hash_known", [True, False])
def test_download_finishes_a_whole_part_without_fetching_it_again(
    server: FileServer, tmp_path: Path, is_hash_known: bool
) -> None:
    """A process that died before the rename leaves nothing to fetch."""
    file = server.serve("/model.bin", BIG)
    dest = tmp_path / "model.bin"
    options: dict[str, Any] = {"sha256": file.sha256} if is_hash_known else {}
    leave_part(file, dest, 600_000, **options)
    staged(tmp_path).write_bytes(BIG)
    file.bytes_sent = 0

    download_file(file.url, dest, policy=QUICK, **options)

    assert dest.read_bytes() == BIG
    assert file.bytes_sent == 0


def test_download_distrusts_kept_bytes_of_another_boot_without_a_hash(
    server: FileServer, tmp_path: Path
) -> None:
    """A power cut may have torn kept bytes; where no hash would show it they are fetched again."""
    file = server.serve("/model.bin", BIG)
    leave_part(file, tmp_path / "model.bin", 600_000)
    note = staged(tmp_path).with_suffix(".json")
    told = json.loads(note.read_text())
    assert told["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    note.write_text(json.dumps(told | {"boot": "an earlier one"}))

    download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert file.requests[-1].range is None


@pytest.mark.parametrize("note", ["", "[]", '{"url": 5}', '{"validator": {}, "url": "x"}', "\0\0\0"])
def test_download_survives_an_unreadable_note(server: FileServer, tmp_path: Path, note: str) -> None:
    """A damaged note costs at most the kept bytes, never the download."""
    file = server.serve("/model.bin", BIG)
    leave_part(file, tmp_path / "model.bin", 600_000)
    staged(tmp_path).with_suffix(".json").write_text(note)

    assert download_file(file.url, tmp_path / "model.bin", policy=QUICK).read_bytes() == BIG


def test_download_starts_over_when_the_server_sends_another_range(server: FileServer, tmp_path: Path) -> None:
    """Bytes from the wrong place are never appended."""
    file = server.serve("/model.bin", BIG, range_shift=7)
    leave_part(file, tmp_path / "model.bin", 600_000)

    dest = download_file(file.url, tmp_path / "model.bin", policy=QUICK)

    assert dest.read_bytes() == BIG
    assert file.requests[-1].range is None


def test_download_ends_though_ranges_are_wrong_and_connections_drop(
    server: FileServer, tmp_path: Path
) -> None:
    """A server that is wrong in every way ends in an error, not in an endless loop."""
    file = server.serve("/model.bin", BIG, range_shift=7, drop_after=100_000)

    with pytest.raises(DownloadError):
        download_file(file.url, tmp_path / "model.bin", sha256=file.sha256, policy=QUICK)

    assert len(file.requests) < 20


def test_download_ends_though_bytes_are_wrong_and_connections_drop(
    server: FileServer, tmp_path: Path
) -> None:
    """Wrong bytes that come in pieces are fetched twice at most."""
    file = server.serve("/model.bin", BIG, flip_at=500_000, drop_after=100_000)

    with pytest.raises(DownloadError) as failure:
        download_file(file.url, tmp_path / "model.bin", sha256=file.sha256, policy=QUICK)

    assert failure.value.reason == "sha256 mismatch"
    assert file.bytes_sent == 2 * len(BIG)
    assert files_in(tmp_path) == set()


def test_download_keeps_its_bytes_when_the_file_is_refused_for_now(
    server: FileServer, tmp_path: Path
) -> None:
    """An expired address costs a new address, not the bytes that were fetched through it."""
    file = server.serve("/model.bin", BIG)
    dest = tmp_path / "model.bin"
    leave_part(file, dest, 600_000, sha256=file.sha256)
    file.answers = [(403, {})]

    with pytest.raises(DownloadError, match="403"):
        download_file(file.url, dest, sha256=file.sha256, policy=QUICK)

    assert staged(tmp_path).stat().st_size == 600_000


# --- patience ---


class Waits:
    """Stands in for waiting: keeps the seconds asked for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, cancel: threading.Event, seconds: float) -> bool:
        self.seconds.append(seconds)
        return cancel.is_set()


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 507, 520, 522, 524, 527, 530])
def test_download_tries_again_after_a_passing_status(server: FileServer, tmp_path: Path, status: int) -> None:
    """An overloaded server is asked again, after the waits of the policy."""
    waits = Waits()
    file = server.serve("/model.bin", BODY, answers=[(status, {}), (status, {})])

    download_file(file.url, tmp_path / "m", policy=Policy(delays_s=(1.0, 2.0, 4.0), wait=waits))

    is_limited = status == 429  # asked more rarely: whoever starts the process again would undo short waits
    assert waits.seconds == ([20.0, 40.0] if is_limited else [1.0, 2.0])
    assert len(file.requests) == 3


def test_download_waits_as_long_as_the_server_asks(
    server: FileServer, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """Retry-After is honoured in both its forms, and capped; each wait is said, with what was asked for."""
    waits = Waits()
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    future = "Fri, 31 Dec 9999 23:59:59 GMT"
    answers = [(429, {"Retry-After": after}) for after in ("7", "100000", past, future, "soon")]
    file = server.serve("/model.bin", BODY, answers=answers)

    told: list[tuple[str, float]] = []
    policy = Policy(
        delays_s=(1, 2, 3, 4, 5), wait=waits, on_wait=lambda why, seconds: told.append((why, seconds))
    )
    download_file(file.url, tmp_path / "m", policy=policy)

    assert waits.seconds == [7, 120, 60, 120, 100]
    assert [seconds for _, seconds in told] == waits.seconds
    assert told[1][0].endswith("-> 429, asks to wait 100000 s")
    assert [facts(record)["retry_in_s"] for record in warnings(logged)] == waits.seconds


def test_download_reads_a_date_to_wait_for_by_the_servers_own_clock(tmp_path: Path) -> None:
    """A box whose clock is wrong waits as long as the server means."""
    waits = Waits()
    answer = (
        b"HTTP/1.1 503 Busy\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
        b"Retry-After: Thu, 01 Jan 1970 00:00:07 GMT\r\nContent-Length: 0\r\n\r\n"
    )
    with raw_server(answer) as url, pytest.raises(DownloadError, match="503"):
        download_file(url, tmp_path / "m", policy=Policy(delays_s=(1,), wait=waits))

    assert waits.seconds == [7]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 501, 505])
def test_download_asks_once_where_the_answer_is_final(
    server: FileServer, tmp_path: Path, status: int
) -> None:
    """A final refusal is not asked for again."""
    waits = Waits()
    file = server.serve("/model.bin", BODY, answers=[(status, {})])

    with pytest.raises(DownloadError) as failure:
        download_file(file.url, tmp_path / "m", policy=Policy(wait=waits))

    assert failure.value.status == status
    assert waits.seconds == []


def test_download_gives_up_on_a_silent_server(server: FileServer, tmp_path: Path) -> None:
    """A server that stops sending is given up after the policy's time, and its bytes are kept."""
    file = server.serve("/model.bin", BIG, hold_after=100_000)

    with pytest.raises(DownloadError, match="streaming body"):
        download_file(file.url, tmp_path / "m", sha256=file.sha256, policy=Policy(stall_s=0.2, delays_s=()))

    assert staged(tmp_path).stat().st_size == 100_000


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


# --- two at once ---


def test_two_processes_share_one_download(server: FileServer, tmp_path: Path) -> None:
    """Of two processes that want one file, one fetches it and the other waits for it."""
    file = server.serve("/model.bin", BIG, hold_after=500_000)
    dest = tmp_path / "model.bin"
    first = start_child(file, dest, sha256=file.sha256)
    await_bytes(first, 500_000)
    second = start_child(file, dest, sha256=file.sha256)
    await_line(second, lambda line: line == "500000")  # the waiting one sees how far the other is
    file.release()

    await_line(first, lambda line: line == "done")
    await_line(second, lambda line: line == "done")
    assert (first.wait(), second.wait()) == (0, 0)
    for child in (first, second):
        assert child.stdout is not None
        child.stdout.close()

    assert dest.read_bytes() == BIG
    assert len(file.requests) == 1
    assert files_in(tmp_path) == {"model.bin"}


def test_a_killed_download_does_not_hold_up_the_next(server: FileServer, tmp_path: Path) -> None:
    """A process that waits for another takes over when that one is killed."""
    file = server.serve("/model.bin", BIG, hold_after=500_000)
    dest = tmp_path / "model.bin"
    child = start_child(file, dest, sha256=file.sha256)
    await_bytes(child, 500_000)
    waiting = threading.Event()

    def look(*_: int | None) -> None:
        waiting.set()

    thread = threading.Thread(
        target=download_file, args=(file.url, dest), kwargs={"sha256": file.sha256, "progress": look}
    )
    thread.start()
    assert waiting.wait(10)
    kill(child)
    file.release()
    thread.join(10)

    assert dest.read_bytes() == BIG
    assert [asked.range for asked in file.requests] == [None, "bytes=500000-"]


def test_process_that_hangs_with_a_download_is_not_waited_for_for_ever(
    server: FileServer, tmp_path: Path
) -> None:
    """Another process that has the file and brings nothing of it is given up after ten minutes; what it
    brings meanwhile begins them anew.
    """
    file = server.serve("/model.bin", BIG, hold_after=500_000)
    dest = tmp_path / "model.bin"
    child = start_child(file, dest, sha256=file.sha256)
    await_bytes(child, 500_000)
    (part,) = (tmp_path / ".staging").glob("*.part")
    waits: list[float] = []

    def wait(event: threading.Event, seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 2900:
            part.touch()  # as when a little more has come
        return event.is_set()

    with pytest.raises(DownloadError, match=r"another process has this download, .* nothing") as caught:
        download_file(file.url, dest, sha256=file.sha256, policy=Policy(wait=wait))

    assert sum(waits) == pytest.approx(2900 * 0.2 + 600, abs=1)
    assert not caught.value.is_final_here
    kill(child)


def test_download_can_be_cancelled_while_another_process_has_the_file(
    server: FileServer, tmp_path: Path
) -> None:
    """A stop does not wait for somebody else's download."""
    file = server.serve("/model.bin", BIG, hold_after=500_000)
    dest = tmp_path / "model.bin"
    child = start_child(file, dest, sha256=file.sha256)
    await_bytes(child, 500_000)
    cancel = threading.Event()

    with pytest.raises(DownloadCancelled):
        download_file(file.url, dest, sha256=file.sha256, cancel=cancel, progress=lambda *_: cancel.set())

    kill(child)
    assert len(file.requests) == 1
    assert staged(tmp_path).stat().st_size == 500_000


# --- addresses ---


@pytest.mark.parametrize(
    "url",
    [
        "http://models.example/model.bin",
        "http://models.example\\@127.0.0.1/model.bin",
        "http://127.0.0.1@models.example/model.bin",
        "ftp://127.0.0.1/model.bin",
        "file:///etc/passwd",
        "http://[::1/model.bin",
        "http:///model.bin",
        "model.bin",
        "",
    ],
)
def test_download_refuses_addresses_that_are_not_allowed(
    tmp_path: Path, logged: pytest.LogCaptureFixture, url: str
) -> None:
    """Only https, and plain http on this machine, is ever asked; a refusal is final."""
    waits = Waits()

    with pytest.raises(DownloadError) as failure:
        download_file(url, tmp_path / "m", policy=Policy(wait=waits))

    assert failure.value.reason == "request error"
    assert "is " in str(failure.value)  # the rule, not a failed connection
    assert waits.seconds == []
    assert len(warnings(logged)) == 1


def test_download_follows_redirects(server: FileServer, tmp_path: Path) -> None:
    """A redirect to an allowed address, on another host too, is followed, and remembered for the rest."""
    file = server.serve("/model.bin", BIG, drop_after=600_000)
    there = f"http://localhost:{server.port}/model.bin"
    entry = server.serve("/entry", b"", redirect=there)
    relative = server.serve("/relative", b"", redirect="entry")

    dest = download_file(relative.url, tmp_path / "m", sha256=file.sha256, policy=QUICK)

    assert dest.read_bytes() == BIG
    assert [asked.range for asked in file.requests] == [None, "bytes=600000-"]
    assert file.requests[0].headers["host"] == f"localhost:{server.port}"
    assert len(entry.requests) == 1


@pytest.mark.parametrize(
    "target",
    ["http://192.0.2.1/model.bin", "file:///etc/passwd", "http://192.0.2.1\\@127.0.0.1/", "http://["],
)
def test_download_refuses_a_redirect_to_a_forbidden_address(
    server: FileServer, tmp_path: Path, target: str
) -> None:
    """Where a redirect leads is judged before it is asked, and a refusal is final."""
    file = server.serve("/model.bin", BODY, redirect=target)

    with pytest.raises(DownloadError, match="redirected to") as failure:
        download_file(file.url, tmp_path / "m", policy=Policy(connect_s=0.5, delays_s=(0, 0)))

    assert failure.value.reason == "request error"
    assert "Timeout" not in str(failure.value)
    assert len(file.requests) == 1


def test_download_ends_a_redirect_loop(server: FileServer, tmp_path: Path) -> None:
    """Redirects that lead nowhere end in an error."""
    file = server.serve("/loop", BODY, redirect="/loop")

    with pytest.raises(DownloadError, match="redirects"):
        download_file(file.url, tmp_path / "m", policy=QUICK)

    assert len(file.requests) == 11


@pytest.mark.parametrize(
    "fault",
    [
        {"answers": [(404, {})]},
        {"redirect": "http://192.0.2.1/x?key=hunter2hunter2"},
        {"no_length": True},
        {"declared_extra": 5, "ranges": False},
        {},
    ],
)
def test_download_never_tells_the_secrets_of_an_address(
    server: FileServer, tmp_path: Path, logged: pytest.LogCaptureFixture, fault: dict[str, Any]
) -> None:
    """Query string and user info are sent to the server, and stand in no error, traceback or log line."""
    file = server.serve("/model.bin", BODY, **fault)
    secret_url = file.url.replace("http://", "http://worker:hunter2hunter2@") + "?key=hunter2hunter2#hunter2"
    told = ""

    try:
        download_file(secret_url, tmp_path / "m", policy=QUICK)
    except DownloadError:
        told = traceback.format_exc()

    assert "key=hunter2hunter2" in file.requests[0].path
    assert "authorization" in file.requests[0].headers
    lines = [f"{record.getMessage()} {facts(record)}" for record in logged.records]
    assert len(lines) >= 2
    assert "hunter2" not in told + "".join(lines)


def test_unreachable_server_is_told_without_the_secrets_of_its_address(tmp_path: Path) -> None:
    """An error of the connection quotes no secret, and neither does its traceback."""
    url = refused_url().replace("http://", "http://worker:hunter2hunter2@") + "?key=hunter2hunter2"
    told = ""

    try:
        download_file(url, tmp_path / "m", policy=QUICK)
    except DownloadError:
        told = traceback.format_exc()

    assert "Connection refused" in told
    assert "hunter2" not in told


def test_fetch_bytes_never_tells_the_secrets_of_an_address() -> None:
    """An input picture's address is as secret as a model's."""
    url = refused_url("/a?key=hunter2hunter2")
    told = ""

    try:
        fetch_bytes(url, max_bytes=1000, policy=QUICK)
    except DownloadError:
        told = traceback.format_exc()

    assert "Connection refused" in told
    assert "hunter2" not in told


def test_download_sends_no_credentials_to_the_host_it_is_redirected_to(
    server: FileServer, tmp_path: Path
) -> None:
    """User info of an address goes to that host alone."""
    file = server.serve("/model.bin", BODY)
    entry = server.serve("/entry", b"", redirect=f"http://localhost:{server.port}/model.bin")

    download_file(entry.url.replace("http://", "http://worker:hunter2@"), tmp_path / "m")

    assert "authorization" in entry.requests[0].headers
    assert "authorization" not in file.requests[0].headers


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


# --- the disk ---

FULL_DISK = """
import os, resource, signal, sys
from pathlib import Path
from studio_worker.transfer.policy import Policy
from studio_worker.download import download_file
from studio_worker.errors import DownloadError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    download_file(sys.argv[1], Path(sys.argv[2]), sha256=sys.argv[3] or None, policy=Policy(delays_s=(0.0,)))
except DownloadError as error:
    print(error.reason, "|", error)
"""


@pytest.mark.parametrize("is_kept", [True, False])
def test_download_tells_when_the_disk_takes_no_more(
    server: FileServer, tmp_path: Path, is_kept: bool
) -> None:
    """A disk that refuses bytes is an error with the disk's reason; what cannot be resumed is removed."""
    file = server.serve("/model.bin", BIG, etag=None)
    arguments = [file.url, str(tmp_path / "m"), file.sha256 if is_kept else ""]

    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, check=True
    )

    assert child.stdout.startswith("store | ")
    assert "File too large" in child.stdout
    assert "[models] root" in child.stdout
    assert len(file.requests) == 1
    assert not (tmp_path / "m").exists()
    assert len(list(tmp_path.rglob("*.part"))) == is_kept


def test_download_ends_well_where_the_staging_folder_is_a_disk_of_its_own(
    server: FileServer, tmp_path: Path
) -> None:
    """What cannot be renamed into its place, because another file system lies between, is copied there."""
    staging = tmp_path / ".staging"
    staging.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(staging)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        file = server.serve("/model.bin", BIG)
        download_file(file.url, tmp_path / "m", sha256=file.sha256, policy=QUICK)
        assert (tmp_path / "m").read_bytes() == BIG
        assert files_in(tmp_path) == {"m"}
    finally:
        subprocess.run(["umount", str(staging)], check=True)


def test_download_tells_when_the_disk_is_full(server: FileServer, tmp_path: Path) -> None:
    """A full disk is an error that says so and names the folder; what has come is kept."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mounted)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("a file system of half a megabyte cannot be mounted here")
    try:
        file = server.serve("/model.bin", BIG, chunked=True)  # its length is not told before
        with pytest.raises(DownloadError, match="no space left on the disk of") as failure:
            download_file(file.url, mounted / "m", sha256=file.sha256, policy=QUICK)
        assert str(mounted) in str(failure.value)
        assert len(file.requests) == 1
        assert not (mounted / "m").exists()
        assert staged(mounted).stat().st_size > 100_000
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def test_download_tells_when_its_folder_cannot_be_made(
    server: FileServer, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    """A folder that cannot be made is an error of the download like any other."""
    (tmp_path / "file").write_bytes(b"")
    file = server.serve("/model.bin", BODY)

    with pytest.raises(DownloadError, match="Not a directory"):
        download_file(file.url, tmp_path / "file" / "models" / "m")

    assert len(warnings(logged)) == 1
    assert file.requests == []


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
