"""One URL to one verified file: streamed, hashed on the way, resumed after a break, renamed when whole.

Knows nothing of systemd, models folders or the studio; progress goes out through a callback. Bytes on
their way live in a staging folder, keyed by content, and survive the process; nothing is ever visible
under its final name before its hash, or where none is known its length, is right.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import requests

from studio_worker.errors import DownloadCancelled, DownloadError
from studio_worker.files import fsync_directory, write_atomic
from studio_worker.logs import safe_url
from studio_worker.models import ModelFile, url_problem

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
"""Called as bytes arrive or are checked: (bytes so far, bytes in all where known)."""

CHUNK_BYTES = 256 * 1024
"""Measured: larger buffers do not make one connection faster."""

_RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Policy:
    """How patient a download is. Times are seconds.

    ``delays_s`` are the waits between tries; a try that brought new bytes starts them again, so that a
    mirror which drops every connection is outlasted as long as it gives something each time.
    """

    connect_s: float = 15.0
    stall_s: float = 30.0
    delays_s: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    retry_after_cap_s: float = 120.0
    allow_insecure: bool = False


def download_file(
    url: str,
    dest: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    staging: Path | None = None,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    policy: Policy | None = None,
) -> Path:
    """Fetch ``url`` into ``dest``; returns ``dest``.

    Args:
        sha256: what the bytes must hash to, in either case.
        size: exact length in bytes, where known.
        staging: folder for the bytes on their way, on the same file system as ``dest``; default
            ``.staging`` beside ``dest``.
        cancel: when set, the download stops soon; its bytes are kept.

    Raises:
        DownloadError: with one of the five reasons; nothing is left under ``dest``.
        DownloadCancelled: ``cancel`` was set.
    """
    return _Download(
        url=url,
        dest=dest,
        sha256=sha256.lower() if sha256 else None,
        size=size,
        staging=staging or dest.parent / ".staging",
        progress=progress or _unseen,
        cancel=cancel or threading.Event(),
        policy=policy or Policy(),
    ).run()


def _unseen(done: int, total: int | None) -> None:
    """The progress callback of a caller who does not look."""


def ensure_file(directory: Path, file: ModelFile, **options: Any) -> Path:
    """``file`` in ``directory``: the one that is there if its hash is right, else downloaded.

    ``options`` are those of :func:`download_file`. A cached file costs no request.
    """
    dest = directory / file.filename
    if dest.is_file():
        if file.sha256 is None or hash_file(dest, progress=options.get("progress")) == file.sha256:
            return dest
        log.warning("cached file is damaged", extra={"op": "download", "dest": str(dest)})
        dest.unlink()
    return download_file(file.url, dest, sha256=file.sha256, **options)


def hash_file(path: Path, progress: Progress | None = None) -> str:
    """The SHA-256 of a file, lower-case hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        _hash_into(digest, file, progress)
    return digest.hexdigest()


def _hash_into(digest: hashlib._Hash, file: IO[bytes], progress: Progress | None) -> int:
    total = os.fstat(file.fileno()).st_size
    done = 0
    while chunk := file.read(4 * CHUNK_BYTES):
        digest.update(chunk)
        done += len(chunk)
        if progress:
            progress(done, total)
    return done


def fetch_bytes(url: str, *, max_bytes: int, policy: Policy) -> bytes:
    """A small file (an input picture) into memory.

    Raises:
        DownloadError: as :func:`download_file`, or the body is larger than ``max_bytes``.
    """
    name = safe_url(url)
    with _get(url, {}, policy) as response:
        if not response.ok:
            raise DownloadError(
                "non-success status", f"GET {name} -> {response.status_code}", status=response.status_code
            )
        body = bytearray()
        for chunk in _chunks(response, name):
            body += chunk
            if len(body) > max_bytes:
                raise DownloadError("size mismatch", f"GET {name}: larger than {max_bytes} bytes")
        return bytes(body)


def _get(url: str, headers: dict[str, str], policy: Policy) -> requests.Response:
    name = safe_url(url)
    if problem := url_problem(url, allow_insecure=policy.allow_insecure):
        raise DownloadError("request error", f"GET {name}: {problem}")
    try:
        response = requests.get(
            url,
            headers={"Accept-Encoding": "identity", **headers},
            stream=True,
            timeout=(policy.connect_s, policy.stall_s),
        )
    except (requests.RequestException, ValueError) as error:
        raise DownloadError("request error", f"GET {name}: {_cause(error)}") from error
    if problem := url_problem(response.url, allow_insecure=policy.allow_insecure):
        response.close()
        raise DownloadError("request error", f"GET {name}: redirected to {safe_url(response.url)}, {problem}")
    return response


def _cause(error: BaseException) -> str:
    """The innermost reason of a requests error, which wraps urllib3's, which wraps the system's.

    Their texts quote whole URLs, query strings and all; the innermost one does not.
    """
    while (inner := getattr(error, "reason", None) or error.__cause__ or error.__context__) is not None:
        if not isinstance(inner, BaseException):
            break
        error = inner
    text = getattr(error, "strerror", None)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _chunks(response: requests.Response, name: str) -> Iterator[bytes]:
    try:
        yield from response.iter_content(CHUNK_BYTES)
    except requests.RequestException as error:
        raise DownloadError("streaming body", f"GET {name}: streaming body: {_cause(error)}") from error


class _Download:
    """One call of :func:`download_file`."""

    def __init__(
        self,
        *,
        url: str,
        dest: Path,
        sha256: str | None,
        size: int | None,
        staging: Path,
        progress: Progress,
        cancel: threading.Event,
        policy: Policy,
    ) -> None:
        self.url = url
        self.name = safe_url(url)
        self.dest = dest
        self.sha256 = sha256
        self.size = size
        self.staging = staging
        self.progress = progress
        self.cancel = cancel
        self.policy = policy
        key = sha256 or hashlib.sha256(url.encode()).hexdigest()
        self.part = staging / f"{key}.part"
        self.note = staging / f"{key}.json"
        self.resumed_from = 0

    def run(self) -> Path:
        started = time.monotonic()
        facts: dict[str, Any] = {"op": "download", "url": self.name, "dest": str(self.dest)}
        log.info("download starting", extra=facts)
        try:
            self.dest.parent.mkdir(parents=True, exist_ok=True)
            self.staging.mkdir(parents=True, exist_ok=True)
            count = self._run_locked()
        except DownloadError as error:
            facts["elapsed_ms"] = _elapsed_ms(started)
            if error.status is not None:
                facts["status"] = error.status
            log.warning(f"download failed: {error.reason}", extra={**facts, "error": str(error)})
            raise
        finally:
            if self.staging == self.dest.parent / ".staging":  # our own default, not a caller's folder
                with contextlib.suppress(OSError):  # not empty, or never made: both are fine
                    self.staging.rmdir()
        facts["elapsed_ms"] = _elapsed_ms(started)
        log.info(
            "download done",
            extra={**facts, "bytes": count, "resumed_from": self.resumed_from, "connections": 1},
        )
        return self.dest

    def _run_locked(self) -> int:
        """Take the staging file for ourselves; another process that works on it is waited for."""
        try:
            while True:
                with self.part.open("a+b") as part:
                    waited = _lock(part)
                    if _is_still(part, self.part):
                        return self._run_tries(part)
                    if waited and self.dest.is_file():
                        return self.dest.stat().st_size  # the other process has finished this very file
        except OSError as error:
            reason = (
                f"no space left on the disk of {self.staging}"
                if error.errno == errno.ENOSPC
                else f"{error.strerror}: {error.filename or self.part}"
            )
            raise DownloadError("streaming body", f"GET {self.name}: streaming body: {reason}") from error

    def _run_tries(self, part: IO[bytes]) -> int:
        delays = iter(self.policy.delays_s)
        worst: DownloadError | None = None
        while True:
            before = _length(part)
            try:
                return self._try_once(part)
            except DownloadCancelled:
                raise
            except DownloadError as error:
                resumed = self.resumed_from > 0
                if error.reason == "sha256 mismatch" and resumed:
                    # The kept bytes may be what is wrong: once more, from nothing.
                    self._discard(part)
                    self.resumed_from = 0
                    continue
                if not _is_passing(error):
                    self._drop()
                    raise
                # A broken body says more than the refused connection that may follow it.
                if worst is None or error.reason == "streaming body":
                    worst = error
                if _length(part) > before:
                    delays = iter(self.policy.delays_s)
                delay = next(delays, None)
                if delay is None:
                    if not _length(part) or not self._may_resume():
                        self._drop()
                    raise worst from error
                wait = min(getattr(error, "retry_after_s", None) or delay, self.policy.retry_after_cap_s)
                if self.cancel.wait(wait):
                    raise DownloadCancelled(self.name) from error

    def _try_once(self, part: IO[bytes]) -> int:
        """One request; returns the length of the verified, renamed file."""
        if not self._may_resume():
            self._discard(part)
        have = _length(part)
        headers = {}
        if have:
            headers["Range"] = f"bytes={have}-"
            if validator := self._read_note().get("validator"):
                headers["If-Range"] = validator
        with _get(self.url, headers, self.policy) as response:
            if response.status_code == 416 and have:
                # Either everything is here already, or the file has changed: the hash decides.
                return self._verify_and_commit(part)
            if not response.ok:
                raise _status_error(self.name, response)
            if response.status_code == 206 and not _continues_at(response, have):
                raise DownloadError(
                    "streaming body", f"GET {self.name}: streaming body: the server sent another range"
                )
            if response.status_code != 206 and have:
                self._discard(part)
                have = 0
            self._write_note(response)
            self.resumed_from = have
            return self._receive(part, response, have)

    def _receive(self, part: IO[bytes], response: requests.Response, have: int) -> int:
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else self.size
        digest = hashlib.sha256()
        part.seek(0)
        _hash_into(digest, part, None)
        part.seek(0, os.SEEK_END)
        done = have
        for chunk in _chunks(response, self.name):
            part.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            self.progress(done, total)
            if self.cancel.is_set():
                part.flush()
                raise DownloadCancelled(self.name)
        part.flush()
        if total is not None and done < total:
            raise DownloadError(
                "streaming body", f"GET {self.name}: streaming body: {done} of {total} bytes arrived"
            )
        return self._commit(part, done, digest.hexdigest())

    def _verify_and_commit(self, part: IO[bytes]) -> int:
        digest = hashlib.sha256()
        part.seek(0)
        return self._commit(part, _hash_into(digest, part, self.progress), digest.hexdigest())

    def _commit(self, part: IO[bytes], length: int, digest: str) -> int:
        if self.size is not None and length != self.size:
            raise DownloadError(
                "size mismatch", f"GET {self.name}: size mismatch: {length} bytes instead of {self.size}"
            )
        if self.sha256 is not None and digest != self.sha256:
            raise DownloadError(
                "sha256 mismatch",
                f"GET {self.name}: sha256 mismatch: {digest} instead of {self.sha256}",
            )
        os.fsync(part.fileno())
        self.part.replace(self.dest)
        fsync_directory(self.dest.parent)
        self.note.unlink(missing_ok=True)
        return length

    # --- the kept bytes ---

    def _may_resume(self) -> bool:
        """Kept bytes are of use where the final hash covers them, or the server can say they are current."""
        return self.sha256 is not None or "validator" in self._read_note()

    def _read_note(self) -> dict[str, str]:
        try:
            note = json.loads(self.note.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return note if isinstance(note, dict) and note.get("url") == self.name else {}

    def _write_note(self, response: requests.Response) -> None:
        etag = response.headers.get("ETag", "")
        # A weak ETag does not promise equal bytes (RFC 9110, 8.8.1), so it cannot guard a resume.
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
        note = {"url": self.name} | ({"validator": validator} if validator else {})
        write_atomic(self.note, json.dumps(note).encode())

    def _discard(self, part: IO[bytes]) -> None:
        part.truncate(0)
        self.note.unlink(missing_ok=True)

    def _drop(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _lock(file: IO[bytes]) -> bool:
    """Lock ``file`` for this process; returns whether another had to be waited for. Ends with the process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    return False


def _is_still(file: IO[bytes], path: Path) -> bool:
    """Whether ``path`` still names the open ``file`` (its last holder may have renamed it)."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _length(part: IO[bytes]) -> int:
    return os.fstat(part.fileno()).st_size


def _elapsed_ms(started: float) -> int:
    return round((time.monotonic() - started) * 1000)


def _continues_at(response: requests.Response, offset: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")


def _is_passing(error: DownloadError) -> bool:
    """Whether another try may help: the one place that decides."""
    if error.reason == "non-success status":
        return error.status in _RETRIED_STATUSES
    return error.reason in {"request error", "streaming body"}


class _StatusError(DownloadError):
    def __init__(self, name: str, status: int, retry_after_s: float | None) -> None:
        super().__init__("non-success status", f"GET {name} -> {status}", status=status)
        self.retry_after_s = retry_after_s


def _status_error(name: str, response: requests.Response) -> DownloadError:
    after = response.headers.get("Retry-After", "")
    return _StatusError(name, response.status_code, float(after) if after.isdigit() else None)
