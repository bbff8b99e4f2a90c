"""One URL to one verified file: streamed, hashed on the way, resumed after a break, renamed when whole.

Knows nothing of systemd, models folders or the studio; progress goes out through a callback. Bytes on
their way live in a staging folder, keyed by content, and survive the process; nothing is ever visible
under its final name before its hash, or where none is known its length, is right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from studio_worker.errors import DownloadCancelled, DownloadError, StoreError
from studio_worker.files import DISK_FULL
from studio_worker.network.urls import safe_url
from studio_worker.transfer.answer import Answer
from studio_worker.transfer.asking import Target
from studio_worker.transfer.attempts import Attempts
from studio_worker.transfer.holding import hold, staging_key
from studio_worker.transfer.policy import Policy
from studio_worker.transfer.staging import Progress as Progress
from studio_worker.transfer.staging import Staged

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.2
_READ_BYTES = 1024 * 1024
_LOCAL_CURES = {
    errno.EFBIG: "the file system, or a limit of this process, takes no file of this size: set [models] root "
    "to a folder on ext4 or xfs, or raise LimitFSIZE",
    errno.EMFILE: "raise the limit of files that this process may open (LimitNOFILE), or lower [models] "
    "max_connections",
    errno.ENFILE: "raise the limit of files that this machine may have open (fs.file-max)",
}


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
    started = time.monotonic()
    cancel = cancel or threading.Event()
    policy = policy or Policy()
    reading = _until(cancel, safe_url(url), reading or progress or _unseen)
    progress = _until(cancel, safe_url(url), progress or _unseen)
    impatient = dataclasses.replace(policy, delays_s=policy.delays_s[:1])  # another way is left
    ways = [
        Attempts(
            url=way,
            dest=dest,
            sha256=sha256.lower() if sha256 else None,
            size=size,
            progress=progress,
            reading=reading,
            cancel=cancel,
            policy=policy if way == url else impatient,
        )
        for way in policy.ways(url)
    ]
    facts: dict[str, Any] = {"op": "download", "url": safe_url(url), "dest": str(dest)}
    log.info("download starting", extra=facts)
    try:
        length, attempts = _run_held(ways, staging or dest.parent / ".staging")
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
    finally:
        if staging is None:  # our own default, not a caller's folder
            with contextlib.suppress(OSError):  # not empty, or never made: both are fine
                (dest.parent / ".staging").rmdir()
    facts["elapsed_ms"] = _elapsed_ms(started)
    policy.on_end(True, length - attempts.resumed_from)
    log.info(
        "download done",
        extra={
            **facts,
            "bytes": length,
            "resumed_from": attempts.resumed_from,
            "connections": attempts.connections,
        },
    )
    return dest


def _run_held(ways: Sequence[Attempts], staging: Path) -> tuple[int, Attempts]:
    """Take the kept bytes for ourselves; another process that works on them is waited for.

    Returns the length and the way that led there.
    """
    attempts = ways[-1]

    last: os.stat_result | None = None
    waited_s = 0.0

    def wait_for_other(found: os.stat_result) -> None:
        """As long as it brings something: a process that hangs must not be waited for as if it worked."""
        nonlocal last, waited_s
        if last is None or (found.st_size, found.st_mtime_ns) != (last.st_size, last.st_mtime_ns):
            last, waited_s = found, 0.0
        if waited_s >= attempts.policy.other_s:
            raise attempts.broken(
                f"another process has this download, and brought nothing for {attempts.policy.other_s:g} s"
            )
        attempts.progress(found.st_size, attempts.size)
        attempts.policy.wait(attempts.cancel, _LOOK_AGAIN_S)
        waited_s += _LOOK_AGAIN_S

    key = staging_key(attempts.url, attempts.sha256)
    try:
        attempts.dest.parent.mkdir(parents=True, exist_ok=True)
        with hold(staging, key, attempts.dest, wait_for_other) as staged:
            if staged is None:
                return attempts.dest.stat().st_size, attempts
            try:
                with attempts.policy.connections.joined():
                    return _run_ways(ways, staged)
            except (DownloadError, OSError):
                if not staged.kept or not any(way.may_resume(staged) for way in ways):
                    staged.drop()
                raise
    except OSError as error:
        if error.errno in _LOCAL_CURES:
            raise StoreError(f"{staging}: {error.strerror}; {_LOCAL_CURES[error.errno]}") from error
        what = (
            f"no space left on the disk of {staging}: {error.strerror}"
            if error.errno in DISK_FULL
            else f"{error.strerror}: {error.filename or staging}"
        )
        raise attempts.broken(what) from error


def _run_ways(ways: Sequence[Attempts], staged: Staged) -> tuple[int, Attempts]:
    """The mirrors in their order, then the address itself, whose error is the one that counts."""
    for way in ways[:-1]:
        try:
            return way.run(staged), way
        except DownloadCancelled:
            raise
        except DownloadError as error:
            log.info("mirror failed", extra={"op": "download", "url": way.name, "error": str(error)})
    return ways[-1].run(staged), ways[-1]


def _unseen(done: int, total: int | None) -> None:
    """The progress callback of a caller who does not look."""


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
        report = _until(cancel or threading.Event(), path.name, progress or _unseen)
        total = os.fstat(file.fileno()).st_size
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            report(file.tell(), total)
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


def _until(cancel: threading.Event, name: str, progress: Progress) -> Progress:
    """``progress`` that ends the work when ``cancel`` is set."""

    def report(done: int, total: int | None) -> None:
        progress(done, total)
        if cancel.is_set():
            raise DownloadCancelled(name)

    return report


def _elapsed_ms(started: float) -> int:
    return round((time.monotonic() - started) * 1000)
