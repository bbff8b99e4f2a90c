"""Every exception of the worker.

* :exc:`StudioWorkerError`

  * :exc:`ConfigError` — the configuration cannot be used; exit status 78

    * :exc:`StateUnavailable` — the state folder, or a disk, cannot be used for now; exit status 75

  * :exc:`DeviceError` — the device asked for cannot be used; exit status 69
  * :exc:`DownloadError` — a file could not be fetched or verified; exit status 74 while provisioning

    * :exc:`DownloadRefused` — another try here would end the same
    * :exc:`PageInPlace` — a web page came in the place of the file
    * :exc:`DownloadCancelled` — the caller asked the download to stop
    * :exc:`StoreError` — the models folder cannot hold or give what is asked

  * :exc:`ProtocolError` — the studio and this worker do not understand each other

    * :exc:`FrameError` — one frame is unreadable; it is dropped
    * :exc:`StudioUnavailable` — the studio could not be reached or answered with a passing error
    * :exc:`UnknownRegistration` — the studio does not know our registration request; start over
    * :exc:`DeliveryRefused` — the studio will never take this result
    * :exc:`ReconnectExhausted` — the allowed number of attempts in a row failed; exit status 75
    * :exc:`DuplicateWorker` — another process uses this worker's identity; exit status 76
    * :exc:`RefusedByStudio` — token refused, worker deleted, registration rejected; exit status 77

  * :exc:`JobError` — one job could not be done; the worker goes on

    * :exc:`JobCancelled` — the job was stopped before its end
    * :exc:`JobImpossible` — no worker can do it
    * :exc:`FileDamaged` — a model's file cannot be understood; whether it is the right one is not known yet
    * :exc:`NotServed` — this worker lacks what it needs, another one may have it

  * :exc:`ControlError` — the running service could not be asked

    * :exc:`ServiceNotRunning` — there is none; exit status 3
    * :exc:`ControlDenied` — this user may not ask it; exit status 4

Exceptions carry their facts as attributes; ``str()`` makes the sentence an operator reads. Two are on
every error, since they are two questions: ``is_final_here`` (does another try on this box end the same?) and
``is_jobs_fault`` (can no worker do the job?). Only the second may make a studio give a job up: a wrong clock,
a certificate that is not known here, a captive portal's page, a full disk are this box's faults.

Exit statuses follow sysexits(3); those of asking the service are the LSB's for init scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar


class StudioWorkerError(Exception):
    """Base of every error this package raises on purpose; its text is one sentence for the operator."""

    exit_status: ClassVar[int] = 1

    @property
    def is_final_here(self) -> bool:
        """Whether another try on this box, as it is, would end the same."""
        return self.is_jobs_fault

    @property
    def is_jobs_fault(self) -> bool:
        """Whether no worker can do the job. Where nobody can tell, another one may."""
        return False

    @property
    def retryable(self) -> bool:
        """Whether another try on this box may end otherwise."""
        return not self.is_final_here


class ConfigError(StudioWorkerError):
    """The configuration cannot be used.

    Args:
        problem: what is wrong, in a few words.
        cure: what the operator should do.
        source: the file, or ``environment variable NAME``, that holds the fault.
        line: 1-based line in that file, where known.
        key: dotted path of the key, e.g. ``worker.device``.
    """

    exit_status: ClassVar[int] = 78  # EX_CONFIG

    def __init__(
        self, problem: str, *, cure: str, source: str = "", line: int | None = None, key: str = ""
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.cure = cure
        self.source = source
        self.line = line
        self.key = key

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}" if self.line is not None else self.source
        sentence = ": ".join(part for part in (where, self.key, self.problem) if part) + f"; {self.cure}"
        return " ".join(sentence.splitlines())  # names and values may hold line ends; this is one line


class StateUnavailable(ConfigError):
    """The state folder is held by another process, its disk takes nothing or is not mounted: that may pass,
    so systemd goes on trying.
    """

    exit_status: ClassVar[int] = 75  # EX_TEMPFAIL


class DeviceError(StudioWorkerError):
    """The device asked for is missing or unusable; the text names the cure."""

    exit_status: ClassVar[int] = 69  # EX_UNAVAILABLE


_PASSING_STATUSES = frozenset({408, 425, 429})
_LASTING_STATUSES = frozenset({501, 505, 506, 508, 510, 511})
"""Of the server's errors those that say how it is set up; RFC 9110, and 511 is a portal to sign in at."""
_GONE_STATUSES = frozenset({404, 410})
_MISMATCHES = frozenset({"sha256 mismatch", "size mismatch"})


class DownloadError(StudioWorkerError):
    """A file could not be fetched or verified.

    Args:
        reason: ``request error``, ``non-success status``, ``streaming body``, ``size mismatch`` or
            ``sha256 mismatch``.
        message: the sentence, without secrets (URLs without query strings).
        status: the HTTP status, where there is one.
    """

    exit_status: ClassVar[int] = 74  # EX_IOERR

    def __init__(self, reason: str, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status

    @property
    def is_final_here(self) -> bool:
        """Whether asking again would bring the same: the one place that decides."""
        if self.status is not None:
            # A 5xx that nobody knows counts as a 500 (RFC 9110, 15): a CDN has its own from 520 on.
            is_passing = self.status in _PASSING_STATUSES or self.status >= 500
            return not is_passing or self.status in _LASTING_STATUSES
        return self.reason in _MISMATCHES

    @property
    def is_jobs_fault(self) -> bool:
        """Whether no worker gets the file: its host has none, or another one than the studio registered."""
        if self.status is not None:
            # All others depend on who asks: a token that this box lacks, a proxy, the country it is in.
            return self.status in _GONE_STATUSES
        return self.reason in _MISMATCHES


class DownloadRefused(DownloadError):
    """A request that must not be made, or an answer that would be the same on another try here.

    Args:
        is_jobs_fault: whether it is the address itself that no worker may use.
    """

    def __init__(self, reason: str, message: str, *, is_jobs_fault: bool = False) -> None:
        super().__init__(reason, message)
        self._is_jobs_fault = is_jobs_fault

    @property
    def is_final_here(self) -> bool:
        return True

    @property
    def is_jobs_fault(self) -> bool:
        return self._is_jobs_fault


class PageInPlace(DownloadError):
    """A web page came in the place of the file: from a captive portal, or a login that this box lacks."""

    @property
    def is_jobs_fault(self) -> bool:
        return False


class DownloadCancelled(DownloadError):
    """The caller asked the download to stop; the bytes so far are kept for the next try."""

    def __init__(self, url: str) -> None:
        super().__init__("cancelled", f"GET {url}: stopped before its end")


class StoreError(DownloadError):
    """The models folder cannot hold or give what is asked of it."""

    def __init__(self, message: str) -> None:
        super().__init__("store", message)


class ProtocolError(StudioWorkerError):
    """The studio and this worker do not understand each other."""


class FrameError(ProtocolError):
    """One frame is unreadable or unknown; it is logged and dropped."""


class StudioUnavailable(ProtocolError):
    """The studio could not be reached or answered with a passing error; try again later.

    Args:
        message: the sentence.
        status: the HTTP status, where there was an answer.
        retry_after_s: seconds the studio asked to wait, where it did.
        is_answer_lost: whether the studio may have had the whole request; what it made of it is not known.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        is_answer_lost: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.is_answer_lost = is_answer_lost


class UnknownRegistration(ProtocolError):
    """The studio does not know our registration request, or not its secret; start over with new ones."""


class DeliveryRefused(ProtocolError):
    """The studio will never take this result: the job is no longer ours, or the upload is not acceptable.

    Args:
        status: the HTTP status of the refusal.
        is_answer_lost: whether the answer to a try just before was lost.
    """

    def __init__(self, status: int, *, is_answer_lost: bool = False) -> None:
        super().__init__(f"the studio refused the result: HTTP {status}")
        self.status = status
        self.is_answer_lost = is_answer_lost

    @property
    def job_is_gone(self) -> bool:
        """Whether the studio does not expect this job from us any more (404, 409, 410)."""
        return self.status in {404, 409, 410}


class ReconnectExhausted(ProtocolError):
    """``[studio] reconnect_attempts`` connections in a row failed."""

    exit_status: ClassVar[int] = 75  # EX_TEMPFAIL


class DuplicateWorker(ProtocolError):
    """Another process is connected with this worker's identity."""

    exit_status: ClassVar[int] = 76  # EX_PROTOCOL


class RefusedByStudio(ProtocolError):
    """The studio refused this worker for good: token refused, worker deleted, registration rejected."""

    exit_status: ClassVar[int] = 77  # EX_NOPERM


class JobError(StudioWorkerError):
    """One job could not be done this time: a later try, here or elsewhere, may do it.

    The worker reports it and goes on; its text is the sentence that the studio gets.
    """


class JobCancelled(JobError):
    """The job was stopped before its end; another worker, or a later try, can do it."""

    def __init__(self, message: str = "the worker is stopping") -> None:
        super().__init__(message)


class JobImpossible(JobError):
    """No worker can do the job: what it asks for cannot be, or what it brings is damaged."""

    @property
    def is_jobs_fault(self) -> bool:
        return True


class FileDamaged(JobError):
    """A model's file cannot be understood. Its hash says whether it is the one that the studio registered.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


class NotServed(JobError):
    """This worker lacks what the job needs: an engine, a family, a kind of file. Another may have it."""

    @property
    def is_final_here(self) -> bool:
        return True


class ControlError(StudioWorkerError):
    """The running service could not be asked over its control socket."""


class ServiceNotRunning(ControlError):
    """Nobody listens on the control socket ``path``. ``instances`` of the service may.

    Args:
        start: the command that starts it, where that is none of systemd's.
    """

    exit_status: ClassVar[int] = 3  # LSB: program is not running

    def __init__(self, path: Path, instances: Sequence[str] = (), start: str = "") -> None:
        self.path = path
        # studio-worker@N.service has its socket in /run/studio-worker-N.
        unit = path.parent.name.replace("studio-worker-", "studio-worker@", 1)
        start = start or f"systemctl start {unit if '@' in unit else 'studio-worker'}"
        self.cure = f"start it: {start}"
        if instances:
            self.cure = f"its instances do: give --instance N, of {', '.join(instances)}"
        super().__init__(f"the service is not running (nobody listens on {path}); {self.cure}")


class ControlDenied(ControlError):
    """This user may not use the control socket ``path``."""

    exit_status: ClassVar[int] = 4  # LSB: insufficient privilege

    def __init__(self, path: Path) -> None:
        super().__init__(f"this user may not use {path}; run the command as root: sudo studio-worker …")
