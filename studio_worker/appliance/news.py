"""What becomes of the service's news: the record of it, and the line that ``systemctl status`` shows."""

from __future__ import annotations

import threading

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

CONNECTED = "connected"

_WHY_CHARS = 300
"""Of a reason in the status line; some of it may come from the studio."""


class News:
    """One service's record, its messages to systemd and its line once it is ready. Safe from any thread."""

    def __init__(self) -> None:
        self.activity = Activity()
        self.notifier = Notifier(self.activity.said, self.activity.hangs)
        self.line = ReadyLine(self.notifier)
        self._lanes: dict[int, LaneNews] = {}
        self._saying = threading.Lock()

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

    def lane(self, number: int) -> LaneNews:
        """For whoever speaks for one lane. To be asked for every lane before any of them has news."""
        lane = self._lanes[number] = LaneNews(self, number)
        return lane

    def lane_says(self) -> None:
        """What a lane is about has changed: the line says it of all of them."""
        with self._saying:  # or the line that is said last might not be the latest
            told = {number: lane.state for number, lane in sorted(self._lanes.items())}
            others = {number: state for number, state in told.items() if state != CONNECTED}
            if len(told) == 1 or not others:
                self.line.say(next(iter(told.values())))
            else:
                head = f"{len(told) - len(others)} of {len(told)} lanes connected"
                rest = (f"lane {number}: {why}" for number, why in others.items() if why)
                self.line.say("; ".join([head, *rest]))


class LaneNews:
    """One lane's news. Safe from any thread."""

    def __init__(self, news: News, number: int) -> None:
        self._news = news
        self.record = news.activity.lane(number)
        self.state = ""
        """What it waits for, or is, for the line."""

    def _say(self, state: str) -> None:
        self.state = state
        self._news.lane_says()

    def registration_waits(self, what: str) -> None:
        """For ``what``: the operator's approval, or a studio that does not answer."""
        self.record.registration("pending", detail=what)
        self._say(what)

    def registered(self, worker_id: str, *, is_given: bool = False) -> None:
        """The studio has approved this worker."""
        self.record.registration("approved", worker_id=worker_id, is_given=is_given)
        self._news.line.note("identity", "")  # somebody has decided who this worker is

    def connected(self) -> None:
        """The session is open."""
        self.record.session("connected")
        self._say(CONNECTED)

    def reconnecting(self, why: str) -> None:
        """The session is down, and there will be another try."""
        self.record.session("reconnecting")
        self._say(f"reconnecting: {why[:_WHY_CHARS]}")

    def ended(self, why: str) -> None:
        """The studio takes nothing from this lane any more; others go on."""
        self.record.registration("ended", detail=why)
        self.record.session("none")
        self._say(f"ended: {why[:_WHY_CHARS]}")

    def offer_answered(self, judgement: Judgement, model: str) -> None:
        """How an offer of a job for ``model`` was answered; the line says what keeps jobs away."""
        activity, line = self._news.activity, self._news.line
        match judgement:
            case Take():
                activity.offer_answered("accepted")
                line.note("offers", "")
            case AlreadyOurs():
                activity.offer_answered("again")
            case Impossible(job_id, error):
                activity.offer_answered("impossible")
                self.record.job_failed(job_id, model, error, retryable=False, handed_back=False)
            case Refuse():
                activity.offer_answered("rejected", judgement.code)
                if not judgement.is_routine:
                    line.note("offers", f"the last offer was refused: {judgement.reason}")
            case OnItsWay() | Ignore():
                pass  # the first is answered when its upload has ended
