"""The studio and this worker do not understand each other, or not for now."""

from __future__ import annotations

from typing import ClassVar

from studio_worker.errors.base import StudioWorkerError


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
        reason: where it could not be reached at all, why, in a few words.
    """

    exit_status: ClassVar[int] = 75  # EX_TEMPFAIL

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
        is_answer_lost: bool = False,
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.is_answer_lost = is_answer_lost
        self.reason = reason


class OrderRefused(ProtocolError):
    """A studio of one's own will not take a person's job, or does not know it any more."""


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


class IdentityRefused(ProtocolError):
    """The studio does not take this identity. ``reset_command`` is how it is forgotten: who knows which one
    of this box's it is says so, and the text names that.
    """

    reset_command = "studio-worker register --reset"
    besides = ""
    """What helps others that it ended before, to be said with it."""

    def __str__(self) -> str:
        return super().__str__().replace(IdentityRefused.reset_command, self.reset_command) + self.besides


class DuplicateWorker(IdentityRefused):
    """Another process is connected with this worker's identity."""

    exit_status: ClassVar[int] = 76  # EX_PROTOCOL


class RefusedByStudio(IdentityRefused):
    """The studio refused this worker for good: token refused, worker deleted, registration rejected."""

    exit_status: ClassVar[int] = 77  # EX_NOPERM
