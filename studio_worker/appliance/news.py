"""What becomes of the service's news: the record of it, and the line that ``systemctl status`` shows."""

from __future__ import annotations

from studio_worker.report.activity import Activity
from studio_worker.report.notify import Notifier, ReadyLine
from studio_worker.studio.session.offers import (
    AlreadyOurs,
    Ignore,
    Impossible,
    Judgement,
    OnItsWay,
    Refuse,
    Take,
)

_WHY_CHARS = 300
"""Of a reason in the status line; some of it may come from the studio."""


class News:
    """One service's record, its messages to systemd and its line once it is ready. Safe from any thread."""

    def __init__(self) -> None:
        self.activity = Activity()
        self.notifier = Notifier(self.activity.said, self.activity.hangs)
        self.line = ReadyLine(self.notifier)

    def download_waits(self, why: str, seconds: float) -> None:
        """A download waits before it asks again: nothing advances, and the start has to outlast it."""
        if self.activity.phase == "provisioning":
            self.notifier.status(f"waiting {seconds:.0f} s: {why}")
            self.notifier.extend_timeout(seconds)

    def gpu_has(self, problem: str) -> None:
        """What is wrong with the GPU now; empty = nothing any more."""
        if self.activity.phase == "ready":
            self.line.note("device", problem)
        elif problem:
            self.notifier.status(problem)

    def paused(self, is_paused: bool) -> None:
        """The operator paused the service, or let it go on."""
        self.activity.was_paused(is_paused)
        self.line.is_paused = is_paused
        if self.activity.phase == "ready":
            self.line.say()

    def registration_waits(self, what: str) -> None:
        """For ``what``: the operator's approval, or a studio that does not answer."""
        self.activity.registration("pending", detail=what)
        self.line.say(what)

    def registered(self, worker_id: str) -> None:
        """The studio has approved this worker."""
        self.activity.registration("approved", worker_id=worker_id)
        self.line.note("identity", "")  # somebody has decided who this worker is

    def connected(self) -> None:
        """The session is open."""
        self.activity.session("connected")
        self.line.say("connected")

    def reconnecting(self, why: str) -> None:
        """The session is down, and there will be another try."""
        self.activity.session("reconnecting")
        self.line.say(f"reconnecting: {why[:_WHY_CHARS]}")

    def offer_answered(self, judgement: Judgement, model: str) -> None:
        """How an offer of a job for ``model`` was answered; the line says what keeps jobs away."""
        match judgement:
            case Take():
                self.activity.offer_answered("accepted")
                self.line.note("offers", "")
            case AlreadyOurs():
                self.activity.offer_answered("again")
            case Impossible(job_id, error):
                self.activity.offer_answered("impossible")
                self.activity.job_failed(job_id, model, error, retryable=False, handed_back=False)
            case Refuse():
                self.activity.offer_answered("rejected", judgement.code)
                if not judgement.is_routine:
                    self.line.note("offers", f"the last offer was refused: {judgement.reason}")
            case OnItsWay() | Ignore():
                pass  # the first is answered when its upload has ended
