"""One URL to one verified file: decide, fetch into staging, check, move.

Knows nothing of systemd, models folders or the studio; progress goes out through a callback. Bytes on
their way live in a staging folder, keyed by content, and survive the process; nothing is ever visible
under its final name before its hash, or where none is known its length, is right. The machinery is in
``transfer``. What it survives, each with the test that shows it:

Of the way there

* An address of the host swallows everything, as IPv6 on many a network
  (``test_download_reaches_a_host_one_of_whose_addresses_swallows_everything``)
* The connection breaks, again and again (``test_download_outlasts_a_server_that_drops_every_connection``)
* One of several connections is silent (``test_download_replaces_a_connection_that_is_silent``)
* All are (``test_download_gives_up_on_a_silent_server``)
* A mirror fails, or spoils the file (``test_origin_is_asked_where_the_mirror_fails``)
* Redirects go round in a circle (``test_download_ends_a_redirect_loop``), lead where nobody may ask
  (``test_download_refuses_a_redirect_to_a_forbidden_address``), or expire
  (``test_expired_redirect_is_asked_for_anew``)
* A proxy wants a password (``test_proxy_that_wants_a_password_is_named``)

Of the server's answers

* Busy or limited for now (``test_download_tries_again_after_a_passing_status``), with the time to wait
  (``test_download_waits_as_long_as_the_server_asks``)
* Refused for good (``test_download_asks_once_where_the_answer_is_final``), or for now, with bytes kept
  (``test_download_keeps_its_bytes_when_the_file_is_refused_for_now``)
* No ranges, wrong ones, or too short ones (``test_download_is_right_whatever_becomes_of_its_ranges``,
  ``test_download_starts_over_when_the_server_sends_another_range``,
  ``test_download_takes_a_range_that_was_cut_short_as_one_step``)
* A part as the whole (``test_download_takes_no_part_for_the_whole``)
* An end that nobody can know (``test_download_refuses_a_body_whose_end_cannot_be_known``), and one that comes
  too early or too late (``test_download_rejects_a_truncated_body_and_caches_nothing``,
  ``test_download_stops_a_body_that_outgrows_its_size``)
* A coding that is not the file's (``test_download_refuses_an_encoded_body``)
* Another file than was registered, or a page in its place (``test_fault_ends_as_it_should``)
* A file that changes meanwhile (``test_download_notices_a_file_that_changed_between_two_requests``,
  ``test_download_never_mixes_two_versions_of_a_file``)
* Tags of its own for each node of a CDN (``test_connections_to_nodes_with_tags_of_their_own_bring_one_file``)

Of this box

* The process is killed (``test_download_resumes_after_a_kill``) or stopped
  (``test_download_ends_soon_when_cancelled``)
* The power is cut (``test_power_cut_costs_what_was_not_synced``)
* Kept bytes are damaged (``test_download_replaces_kept_bytes_that_are_damaged``), or their note is
  (``test_download_survives_an_unreadable_note``)
* The file on disk is damaged (``test_ensure_file_replaces_a_damaged_cached_file``)
* Another process fetches the same (``test_two_processes_share_one_download``), dies with it
  (``test_a_killed_download_does_not_hold_up_the_next``) or hangs
  (``test_process_that_hangs_with_a_download_is_not_waited_for_for_ever``)
* The disk is full (``test_download_tells_when_the_disk_is_full``), or takes no more of the file
  (``test_download_tells_when_the_disk_takes_no_more``)
* Staging and models are on two disks
  (``test_download_ends_well_where_the_staging_folder_is_a_disk_of_its_own``)
* Threads are short (``test_download_does_with_the_threads_that_there_are``)
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from studio_worker.context import called
from studio_worker.errors import DownloadCancelled, DownloadError
from studio_worker.transfer.answer import Answer
from studio_worker.transfer.asking import Target
from studio_worker.transfer.attempts import Attempts
from studio_worker.transfer.disk import disk_errors
from studio_worker.transfer.holding import hold
from studio_worker.transfer.policy import Policy
from studio_worker.transfer.staging import Staged
from studio_worker.transfer.wanted import Caller, Progress, Wanted

log = logging.getLogger(__name__)

_READ_BYTES = 1024 * 1024


class RemoteFile(Protocol):
    """What a :class:`studio_worker.models.ModelFile` says of where it comes from."""

    @property
    def url(self) -> str:
        """Where it is fetched."""

    @property
    def filename(self) -> str:
        """Its name, without folders."""

    @property
    def sha256(self) -> str | None:
        """Lower-case hex, where it is known."""


def download_file(
    url: str,
    dest: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    staging: Path | None = None,
    progress: Progress | None = None,
    reading: Progress | None = None,
    cancel: threading.Event | None = None,
    policy: Policy | None = None,
) -> Path:
    """Fetch ``url`` into ``dest``; returns ``dest``.

    Args:
        sha256: what the bytes must hash to, in either case.
        size: exact length in bytes, where known.
        staging: folder for the bytes on their way, on the same file system as ``dest``; default
            ``.staging`` beside ``dest``.
        reading: called in the place of ``progress`` while bytes of an earlier call are read back.
        cancel: when set, the download stops soon; its bytes are kept.

    Raises:
        DownloadError: with one of the five reasons; nothing is left under ``dest``.
        DownloadCancelled: ``cancel`` was set.
    """
    wanted = Wanted(url, dest, sha256.lower() if sha256 else None, size)
    caller = Caller(wanted.name, progress, reading, cancel)
    policy = policy or Policy()
    with (
        called(url=wanted.name, dest=str(dest)),
        _told(policy) as brought,
        _staging(dest, staging) as folder,
        disk_errors(wanted, folder),
    ):
        dest.parent.mkdir(parents=True, exist_ok=True)
        with hold(folder, wanted, caller, policy) as staged:
            if staged is None:  # another process has just brought it
                brought.length = dest.stat().st_size
            else:
                way = _bring(wanted, staged, caller, policy)
                brought.length, brought.resumed_from = staged.length, way.resumed_from
                brought.connections = way.connections
    return dest


def _bring(wanted: Wanted, staged: Staged, caller: Caller, policy: Policy) -> Attempts:
    """Fetch, check and move the file. Returns the way that led there."""
    impatient = replace(policy, delays_s=policy.delays_s[:1])  # another way is left
    *mirrors, itself = policy.ways(wanted.url)
    ways = [Attempts(wanted.at(mirror), caller, impatient) for mirror in mirrors]
    ways.append(Attempts(wanted.at(itself), caller, policy))
    try:
        with policy.connections.joined():
            way = _first_that_leads_there(ways, staged)
            staged.commit(wanted.dest)
            return way
    except (DownloadError, OSError):
        if not staged.kept or not any(way.may_resume(staged) for way in ways):
            staged.drop()
        raise


def _first_that_leads_there(ways: Sequence[Attempts], staged: Staged) -> Attempts:
    """The mirrors in their order, then the address itself, whose error is the one that counts."""
    for way in ways[:-1]:
        try:
            way.run(staged)
            return way
        except DownloadCancelled:
            raise
        except DownloadError as error:
            log.info("mirror failed", extra={"op": "download", "url": way.wanted.name, "error": str(error)})
    ways[-1].run(staged)
    return ways[-1]


def ensure_file(directory: Path, file: RemoteFile, **options: Any) -> Path:
    """``file`` in ``directory``: the one that is there if its hash is right, else downloaded.

    ``options`` are those of :func:`download_file`. A cached file costs no request.
    """
    dest = directory / file.filename
    if dest.is_file():
        if file.sha256 is None:
            return dest
        reading = options.get("reading") or options.get("progress")
        if hash_file(dest, progress=reading, cancel=options.get("cancel")) == file.sha256:
            return dest
        log.warning("cached file is damaged", extra={"op": "download", "dest": str(dest)})
        dest.unlink(missing_ok=True)
    return download_file(file.url, dest, sha256=file.sha256, **options)


def hash_file(path: Path, *, progress: Progress | None = None, cancel: threading.Event | None = None) -> str:
    """The SHA-256 of a file, lower-case hex.

    Raises:
        DownloadCancelled: ``cancel`` was set.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        caller = Caller(path.name, progress, cancel=cancel)
        total = os.fstat(file.fileno()).st_size
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            caller.moved(file.tell(), total)
    return digest.hexdigest()


def fetch_bytes(
    url: str,
    *,
    max_bytes: int,
    policy: Policy,
    cancel: threading.Event | None = None,
    until: float = float("inf"),
) -> bytes:
    """A small file (an input picture) into memory; given up at :func:`time.monotonic` ``until``.

    Raises:
        DownloadError: as :func:`download_file`, or the body is larger than ``max_bytes``.
        DownloadCancelled: ``cancel`` was set.
    """
    with Answer(Target(url), {}, policy, cancel or threading.Event()) as answer:
        if answer.status != 200:
            raise answer.unwanted()
        body = bytearray()
        if (answer.length or 0) <= max_bytes:
            for chunk in answer.chunks():
                body += chunk
                if time.monotonic() > until:
                    raise DownloadError("streaming body", f"GET {answer.name}: too slow")
                if len(body) > max_bytes:
                    break
            else:
                return bytes(body)
        raise DownloadError("size mismatch", f"GET {answer.name}: larger than {max_bytes} bytes")


@dataclass
class _Brought:
    """What a download has brought, how much of it an earlier call, and over how many connections at most."""

    length: int = 0
    resumed_from: int = 0
    connections: int = 1


@contextlib.contextmanager
def _told(policy: Policy) -> Iterator[_Brought]:
    """The log, and whoever counts, hear of the download's beginning and end."""
    started = time.monotonic()
    facts: dict[str, Any] = {"op": "download"}
    log.info("download starting", extra=facts)
    brought = _Brought()
    try:
        yield brought
    except DownloadCancelled:
        log.info("download stopped", extra={**facts, "elapsed_ms": _elapsed_ms(started)})
        raise
    except DownloadError as error:
        facts["elapsed_ms"] = _elapsed_ms(started)
        if error.status is not None:
            facts["status"] = error.status
        log.warning(f"download failed: {error.reason}", extra={**facts, "error": str(error)})
        policy.on_end(False, 0)
        raise
    policy.on_end(True, brought.length - brought.resumed_from)
    log.info(
        "download done",
        extra={
            **facts,
            "elapsed_ms": _elapsed_ms(started),
            "bytes": brought.length,
            "resumed_from": brought.resumed_from,
            "connections": brought.connections,
        },
    )


@contextlib.contextmanager
def _staging(dest: Path, given: Path | None) -> Iterator[Path]:
    """The folder for bytes on their way; our own default, not a caller's, goes with the last of them."""
    folder = given or dest.parent / ".staging"
    try:
        yield folder
    finally:
        if given is None:
            with contextlib.suppress(OSError):  # not empty, or never made: both are fine
                folder.rmdir()


def _elapsed_ms(started: float) -> int:
    return round((time.monotonic() - started) * 1000)
