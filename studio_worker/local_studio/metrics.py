"""Metrics for Prometheus: how long the line is, who works, what became of jobs, what this process answered.

What is asked of the database (queue, jobs that are kept, registrations) is the same from every process of one
studio: take the maximum. Sessions, counters and the histogram are this process's own: take the sum. A counter
begins at 0 with its process, as Prometheus expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from studio_worker import __version__
from studio_worker.local_studio import rules
from studio_worker.local_studio.facts import Facts
from studio_worker.local_studio.rules import JobStatus, QueuedJob

_PREFIX = "local_studio_"
_WAIT_BUCKETS_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 14_400, 86_400)
_OUTCOMES = (JobStatus.DONE, JobStatus.FAILED)
_CAUSES = ("worker", "studio")


class Metrics:
    """The registry of one studio process. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._queued = self._counter("jobs_queued", "Jobs that were queued.")
        self._ended = self._counter("jobs_ended", "Jobs that ended, by outcome.", "outcome", _OUTCOMES)
        self._released = self._counter(
            "claims_released", "Claims that were lost with a session, by whose it was.", "cause", _CAUSES
        )
        self._answers = Counter(
            f"{_PREFIX}http_answers",
            "Answers over HTTP, by what was asked for and by status.",
            ["part", "status"],
            registry=self._registry,
        )
        self._waits = Histogram(
            f"{_PREFIX}offer_wait_seconds",
            "Time from the queue to the first offer.",
            buckets=_WAIT_BUCKETS_S,
            registry=self._registry,
        )
        for part, status in (("upload", 200), ("upload", 409), ("upload", 503), ("upload", 507)):
            # From the start, or an increase would not show where one comes for the first time.
            self._answers.labels(part, status)

    def watch(self, facts: Callable[[], Facts]) -> None:
        """Ask ``facts`` whenever somebody asks us."""
        self._registry.register(_Asked(facts))

    def stepped(self, before: QueuedJob | None, after: QueuedJob) -> None:
        """A job took a step, and the database has it; ``before`` is ``None`` for a new one."""
        if before is None:
            self._queued.inc()
            return
        if before.status != after.status and after.status in _OUTCOMES:
            self._ended.labels(after.status).inc()
        if after.status is JobStatus.OFFERED and before.offered_at is None and after.offered_at is not None:
            self._waits.observe(max(0.0, after.offered_at - after.created_at))
        if cause := _lost_by(before, after):
            self._released.labels(cause).inc()

    def answered(self, part: str, status: int) -> None:
        """An answer began."""
        self._answers.labels(part, status).inc()

    def answer(self, accept: str) -> tuple[str, bytes]:
        """Everything as whoever scrapes wants it: its media type and the text. May block."""
        encode, media_type = choose_encoder(accept)
        return media_type, encode(self._registry)

    def _counter(self, name: str, text: str, label: str = "", values: Iterable[str] = ()) -> Counter:
        counter = Counter(_PREFIX + name, text, [label] if label else [], registry=self._registry)
        for value in values:
            counter.labels(value)
        return counter


class _Asked(Collector):
    """Turns facts into samples."""

    def __init__(self, facts: Callable[[], Facts]) -> None:
        self._facts = facts

    def describe(self) -> Iterable[Metric]:
        return ()  # or the registry would collect once to learn the names

    def collect(self) -> Iterator[Metric]:
        now = self._facts()
        yield _gauge("build_info", "The version that runs.", {__version__: 1}, "version")
        yield _gauge("database_up", "Whether the database answers.", now.has_database)
        lengths = {model: waiting.jobs for model, waiting in now.queue.items()}
        yield _gauge("queue_jobs", "Jobs that wait, by model.", lengths, "model")
        oldest = {model: waiting.oldest_at for model, waiting in now.queue.items()}
        yield _gauge("queue_oldest_timestamp_seconds", "When the oldest of them was queued.", oldest, "model")
        yield _gauge("jobs", "Jobs that the studio has, by status.", now.jobs, "status")
        yield _gauge("sessions", "Workers that are connected here, by state.", now.sessions, "state")
        if now.registrations is not None:
            yield _gauge("registrations_pending", "Machines that wait for approval.", now.registrations)
        if (ends_at := now.certificate_ends_at) is not None:
            yield _gauge("certificate_end_timestamp_seconds", "When the certificate ends.", ends_at)


def _lost_by(before: QueuedJob, after: QueuedJob) -> str | None:
    """Whose fault it is that a claim was let go of, where this step did it."""
    is_dropped = before.status in rules.HELD and after.status in (JobStatus.QUEUED, JobStatus.FAILED)
    if not is_dropped or before.worker_id is None or after.dropped_by != before.worker_id:
        return None
    if after.attempts == before.attempts:
        return "worker"
    # No worker is to blame where the attempt is given back; nor is one lost that was declined.
    return "studio" if before.dropped_by != before.worker_id else None


def _gauge(name: str, text: str, value: float | Mapping[str, float], label: str = "") -> Metric:
    metric = GaugeMetricFamily(_PREFIX + name, text, labels=[label] if label else [])
    if isinstance(value, Mapping):
        for each, number in value.items():
            metric.add_metric([each], float(number))
    else:
        metric.add_metric([], float(value))
    return metric
