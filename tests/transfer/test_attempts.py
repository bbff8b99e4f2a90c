"""Whether another try may help, and of what use the bytes are that came before it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from studio_worker.download import download_file
from studio_worker.errors import DownloadError
from studio_worker.report.logs import facts
from studio_worker.transfer.policy import Policy
from tests.fakes.servers import FileServer, raw_server
from tests.lab.downloads import (
    BIG,
    BODY,
    BODY_SHA256,
    QUICK,
    Waits,
    await_bytes,
    files_in,
    kill,
    leave_part,
    staged,
    start_child,
    warnings,
)

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
