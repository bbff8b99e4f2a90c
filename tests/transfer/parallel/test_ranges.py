"""What several connections promise: the same bytes, each fetched about once, whatever the server does."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio_worker.download import download_file
from studio_worker.errors import DownloadError
from studio_worker.transfer.policy import Connections, Policy
from tests.fakes.servers import FileServer, ServedFile

LARGE = random.Random(2).randbytes(24 * 1024 * 1024)
SHA256 = hashlib.sha256(LARGE).hexdigest()
QUICK = Policy(connect_s=5, stall_s=5, delays_s=(0.0, 0.0, 0.0))
PACE = 6_000_000
"""Bytes a second of one connection, where a test wants several of them."""


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
    guards = {asked.headers.get("if-range") for asked in file.requests[1:]}
    assert guards == {None if is_hash_known else file.current_etag()}
    assert file.bytes_sent < 1.3 * len(LARGE)
    assert files_in(tmp_path) == {"m"}


def test_download_stays_with_one_connection_where_it_may_use_no_more(
    server: FileServer, tmp_path: Path
) -> None:
    """The largest number of connections is the operator's to set."""
    file = server.serve("/model.bin", LARGE)

    policy = Policy(connections=Connections(1))
    assert download_file(file.url, tmp_path / "m", sha256=SHA256, policy=policy).read_bytes() == LARGE

    assert [asked.range for asked in file.requests] == [None]
    assert file.bytes_sent == len(LARGE)


@pytest.mark.parametrize("fault", [{"bare_ranges": True}, {"ranges": False, "etag": None}])
def test_download_is_right_whatever_becomes_of_its_ranges(
    server: FileServer, tmp_path: Path, fault: dict[str, Any]
) -> None:
    """A server that says little of its ranges still gives the file; fault_matrix.py has the worse ones."""
    file = slow(server, **fault)

    download_file(file.url, tmp_path / "m", sha256=SHA256, policy=QUICK)

    assert (tmp_path / "m").read_bytes() == LARGE
    assert files_in(tmp_path) == {"m"}


def test_download_never_mixes_two_versions_of_a_file(server: FileServer, tmp_path: Path) -> None:
    """A file that changes while several connections fetch it is fetched whole in its new version."""
    file = slow(server)
    changed = LARGE[::-1]
    file.on_request = lambda earlier: setattr(file, "content", changed) if earlier == 2 else None

    download_file(file.url, tmp_path / "m", policy=QUICK)

    assert (tmp_path / "m").read_bytes() == changed


@pytest.mark.parametrize("range_status", [206, 200])
def test_connections_to_nodes_with_tags_of_their_own_bring_one_file(
    server: FileServer, tmp_path: Path, range_status: int
) -> None:
    """Neither another ETag on each connection nor a range with a whole answer's status stops a known file."""
    file = slow(server, range_status=range_status)
    file.on_request = lambda earlier: setattr(file, "etag", f'"node-{earlier}"')

    download_file(file.url, tmp_path / "m", sha256=SHA256, policy=QUICK)

    assert (tmp_path / "m").read_bytes() == LARGE
    assert file.bytes_sent < 2 * len(LARGE)
    assert not any("if-range" in asked.headers for asked in file.requests)


def test_download_replaces_a_connection_that_is_silent(server: FileServer, tmp_path: Path) -> None:
    """One connection without a byte is not waited for: another fetches what it would have brought."""
    file = slow(server, hold_request=2)

    policy = Policy(stall_s=1.0, slow_s=0.5, delays_s=(0.0,))
    download_file(file.url, tmp_path / "m", sha256=SHA256, policy=policy)

    assert (tmp_path / "m").read_bytes() == LARGE
    assert file.held.is_set()


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


def test_downloads_share_the_connections(server: FileServer, tmp_path: Path) -> None:
    """Several files at once take no more connections together than are allowed, and each has some of them."""
    served = [server.serve(f"/{name}", LARGE, rate=PACE, etag=f'"{name}"') for name in "ab"]
    policy = replace(QUICK, connections=Connections(6))
    threads = [
        threading.Thread(target=download_file, args=(file.url, tmp_path / f"{at}"), kwargs={"policy": policy})
        for at, file in enumerate(served)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all((tmp_path / f"{at}").read_bytes() == LARGE for at in range(2))
    assert all(len(file.requests) > 2 for file in served)
    # The server is a moment behind: it notices an end when it has sent what it was at.
    assert server.crowd.most <= 6 + 2


def test_download_gives_connections_back_to_one_that_joins() -> None:
    """A share is the whole for one download, half of it for two, and never nothing."""
    connections = Connections(3)
    assert connections.share == 3
    with connections.joined(), connections.joined():
        assert connections.share == 1
        with connections.joined(), connections.joined():
            assert connections.share == 1
    assert connections.share == 3


def test_power_cut_costs_what_was_not_synced(server: FileServer, tmp_path: Path) -> None:
    """After another boot what was synced is used, whatever else is in the file; without the hash, too."""
    file = slow(server)
    cancel = threading.Event()

    def synced() -> bool:
        return any(json.loads(note.read_text())["durable"] for note in tmp_path.rglob("*.json"))

    def stop_when_synced(done: int, _: int | None) -> None:
        if done < len(LARGE) and synced():
            cancel.set()

    policy = replace(QUICK, sync_s=0.05)
    with pytest.raises(DownloadError):
        download_file(file.url, tmp_path / "m", progress=stop_when_synced, cancel=cancel, policy=policy)
    (note,) = tmp_path.rglob("*.json")
    told = json.loads(note.read_text()) | {"boot": "an earlier one"}
    note.write_text(json.dumps(told))
    kept = sum(end - start for start, end in told["durable"])
    with note.with_suffix(".part").open("r+b") as part:  # what the cut has torn
        for start, end in _gaps(told["durable"]):
            part.seek(start)
            part.write(bytes(end - start))
    file.bytes_sent = 0

    download_file(file.url, tmp_path / "m", policy=QUICK)

    assert (tmp_path / "m").read_bytes() == LARGE
    assert kept > 0
    assert file.bytes_sent < 1.2 * len(LARGE) - kept


def _gaps(spans: list[list[int]]) -> list[tuple[int, int]]:
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(LARGE)]
    return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]


def test_redirect_is_asked_once_for_all_connections(server: FileServer, tmp_path: Path) -> None:
    """Where the first request was sent is where all the others go."""
    file = slow(server)
    entry = server.serve("/entry", b"", redirect="/model.bin")

    download_file(entry.url, tmp_path / "m", sha256=SHA256, policy=QUICK)

    assert (tmp_path / "m").read_bytes() == LARGE
    assert len(file.requests) > 2
    assert len(entry.requests) == 1


def test_expired_redirect_is_asked_for_anew(server: FileServer, tmp_path: Path) -> None:
    """An address that is signed for a while and refused afterwards costs a new one, and no bytes."""
    old = server.serve("/old", LARGE, etag='"one"', drop_after=5_000_000, range_answers=[(403, {})] * 99)
    new = server.serve("/new", LARGE, etag='"one"', rate=PACE)
    entry = server.serve("/entry", b"", redirect="/old")
    entry.on_request = lambda earlier: setattr(entry, "redirect", "/new") if earlier else None

    download_file(entry.url, tmp_path / "m", policy=QUICK)

    assert (tmp_path / "m").read_bytes() == LARGE
    assert old.bytes_sent == 5_000_000
    assert new.bytes_sent < 1.2 * len(LARGE) - old.bytes_sent
