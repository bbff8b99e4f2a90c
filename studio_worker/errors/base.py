"""What every error of this package is: one sentence for the operator, and whose fault it was."""

from __future__ import annotations

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
