"""One job could not be done; the worker goes on."""

from __future__ import annotations

from pathlib import Path

from studio_worker.errors.base import StudioWorkerError


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
