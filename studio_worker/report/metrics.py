"""Metrics for Prometheus: what the service says of itself, by its conventions for names and units.

Everything but the histograms is taken from a snapshot at the moment of asking. Served on a loopback port, or
written to a file for node_exporter's textfile collector, or both, or (the default) not at all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from studio_worker.errors import ConfigError
from studio_worker.report.scrapes import ScrapeServer
from studio_worker.report.snapshot import EndedJob, GpuFacts, Snapshot

log = logging.getLogger(__name__)

_PREFIX = "studio_worker_"
_WRITE_EVERY_S = 15.0
_STAGE_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """The registry of one running service.

    Args:
        snapshot: asked each time that somebody asks us.
        reload_succeeded: whether the last reload of the configuration did.
    """

    def __init__(self, snapshot: Callable[[], Snapshot], reload_succeeded: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._stages = Histogram(
            f"{_PREFIX}job_stage_seconds",
            "Time that delivered jobs took, by stage.",
            ["stage"],
            buckets=_STAGE_BUCKETS_S,
            registry=self.registry,
        )
        self.registry.register(_Snapshots(snapshot, reload_succeeded))

    def job_ended(self, job: EndedJob) -> None:
        """To be called for each job that ends."""
        for stage, seconds in job.stages_s.items():
            self._stages.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self.registry)

    def answer(self, accept: str) -> tuple[str, bytes]:
        """The same as whoever scrapes wants it: its media type and the text."""
        encode, media_type = choose_encoder(accept)
        return media_type, encode(self.registry)


class Exporter:
    """Serves and writes the metrics from its making until :meth:`close`.

    Args:
        listen: host and port, or ``None``.
        textfile: made anew every few seconds, readable by everybody, and removed by :meth:`close`.

    Raises:
        ConfigError: the port is taken, or the file cannot be written.
    """

    def __init__(
        self,
        metrics: Metrics,
        listen: tuple[str, int] | None,
        textfile: Path | None,
        every_s: float = _WRITE_EVERY_S,
    ) -> None:
        self._metrics = metrics
        self._textfile = textfile
        self._every_s = every_s
        self._closed = threading.Event()
        self._server: ScrapeServer | None = None
        self._thread: threading.Thread | None = None
        if textfile is not None:
            try:
                self._write(textfile)
            except OSError as error:
                raise ConfigError(
                    f"{textfile} cannot be written: {error.strerror}",
                    key="metrics.textfile",
                    cure="name another file, or give the unit ReadWritePaths= for its folder",
                ) from error
            self._thread = threading.Thread(target=self._keep_writing, name="metrics", daemon=True)
            self._thread.start()
        if listen is not None:
            host, port = listen
            try:
                self._server = ScrapeServer(host, port, metrics.answer)
            except OSError as error:
                raise ConfigError(
                    f"cannot listen on {host}:{port}: {error.strerror}",
                    key="metrics.listen",
                    cure="name another port, or end what listens there (ss -ltnp)",
                ) from error

    def close(self) -> None:
        self._closed.set()
        if self._server is not None:
            self._server.close()
        if self._textfile is not None:
            if self._thread is not None:
                self._thread.join()
            # What is left of a service that has stopped would look like one that runs.
            self._textfile.unlink(missing_ok=True)

    def _keep_writing(self) -> None:
        assert self._textfile is not None
        while not self._closed.wait(self._every_s):
            try:
                self._write(self._textfile)
            except OSError as error:  # a full disk; the jobs matter more
                log.warning(
                    "metrics cannot be written",
                    extra={"op": "metrics", "path": str(self._textfile), "error": error.strerror},
                )

    def _write(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(self._metrics.text())
        temporary.chmod(0o644)  # node_exporter is another user
        temporary.replace(path)


class _Snapshots(Collector):
    """Turns a snapshot into samples."""

    def __init__(self, snapshot: Callable[[], Snapshot], reload_succeeded: Callable[[], bool]) -> None:
        self._snapshot = snapshot
        self._reload_succeeded = reload_succeeded

    def describe(self) -> Iterable[Metric]:
        return ()  # or the registry would collect once to learn the names

    def collect(self) -> Iterator[Metric]:
        now = self._snapshot()
        yield _gauge("build_info", "The version that runs.", {now.version: 1}, "version")
        yield _gauge("ready", "Whether the service is ready and not stopping.", now.phase == "ready")
        yield _gauge("paused", "Whether jobs are refused on the operator's wish.", now.paused)
        if now.ready_after_s is not None:
            yield _gauge("startup_seconds", "Time from the start to READY.", now.ready_after_s)
        yield _gauge(
            "config_last_reload_successful", "Whether the last reload was.", self._reload_succeeded()
        )
        yield _counter("starts", "Starts of the service on this box.", now.process.starts)
        yield _counter("crashes", "Starts after a process that did not end by itself.", now.process.crashes)
        yield from _session(now)
        yield from _jobs(now)
        yield from _transfers(now)
        yield from _device(now)


def _session(now: Snapshot) -> Iterator[Metric]:
    is_approved = now.registration.state == "approved"
    yield _gauge("registered", "Whether the studio has approved this worker, or a lane of it.", is_approved)
    yield _gauge(
        "session_connected", "Whether a session with the studio is open.", now.session.state == "connected"
    )
    yield _counter("session_reconnects", "Sessions that had to be opened anew.", now.session.reconnects)
    approved = {str(lane.lane): lane.registration.state == "approved" for lane in now.lanes}
    connected = {str(lane.lane): lane.session.state == "connected" for lane in now.lanes}
    yield _gauge("lane_registered", "Whether the studio has approved this lane.", approved, "lane")
    yield _gauge("lane_connected", "Whether this lane's session is open.", connected, "lane")
    busy = {str(lane.lane): lane.job is not None for lane in now.lanes}
    yield _gauge("lane_job_in_hand", "Whether this lane has a job in hand.", busy, "lane")


def _jobs(now: Snapshot) -> Iterator[Metric]:
    yield _counter("jobs", "Jobs that have ended, by outcome.", now.jobs, "outcome")
    yield _gauge("job_in_hand", "Whether a job is being made.", now.job is not None)
    yield _counter("model_switches", "Turns at the device of another model than before.", now.turns.switches)
    yield _counter(
        "model_switches_saved",
        "Turns that came before an older one because their model was loaded.",
        now.turns.switches_saved,
    )
    yield _gauge(
        "failures_in_a_row", "Failed jobs since the last picture, this box's faults.", now.health.failures
    )
    held = now.health.held
    scopes = {
        "box": sum(each.model is None for each in held),
        "model": sum(each.model is not None for each in held),
    }
    yield _gauge("held_back", "What no jobs are taken of for a while: everything, models.", scopes, "scope")
    offers = {
        "accepted": now.offers.accepted,
        "again": now.offers.again,
        "impossible": now.offers.impossible,
        # From the start, or an increase would not show where a code comes for the first time.
        **{f"rejected_{code}": now.offers.rejected.get(code, 0) for code in ("busy", "paused", "other")},
    }
    yield _counter("offers", "Offers of jobs, by how they were answered.", offers, "answer")


def _transfers(now: Snapshot) -> Iterator[Metric]:
    downloads, uploads, outbox = now.downloads, now.uploads, now.outbox
    yield _counter(
        "downloads",
        "Downloads of model files, by outcome.",
        {"done": downloads.done, "failed": downloads.failed},
        "outcome",
    )
    yield _counter("download_bytes", "Bytes received for model files.", downloads.received_bytes)
    yield _counter(
        "uploads",
        "Finished pictures, by what the studio said.",
        {
            "delivered": uploads.delivered,
            "refused": uploads.refused,
            "unconfirmed": uploads.unconfirmed,
        },
        "outcome",
    )
    yield _counter("upload_retries", "Uploads that will be tried again.", uploads.retries)
    yield _counter("upload_bytes", "Bytes of delivered pictures.", uploads.delivered_bytes)
    yield _gauge("outbox_pictures", "Finished pictures that wait for delivery.", outbox.count)
    yield _gauge("outbox_bytes", "Their size.", outbox.size_bytes)
    if outbox.oldest_at is not None:
        yield _gauge("outbox_oldest_timestamp_seconds", "When the oldest was finished.", outbox.oldest_at)


def _device(now: Snapshot) -> Iterator[Metric]:
    name = now.device.name
    yield _gauge(
        "device_memory_size_bytes", "Memory of the device.", {name: now.device.total_bytes}, "device"
    )
    if now.device.used_bytes is not None:
        yield _gauge(
            "device_memory_used_bytes", "What the worker uses of it.", {name: now.device.used_bytes}, "device"
        )
    if now.device.gpu is not None:
        yield from _gpu(now.device.gpu)
    resident = {model.model: model.size_bytes for model in now.resident}
    yield _gauge("model_memory_bytes", "Device memory by loaded model.", resident, "model")


def _gpu(gpu: GpuFacts) -> Iterator[Metric]:
    """By its place on the bus; what the card does not tell is left out."""
    for name, text, value in (
        ("temperature_celsius", "Temperature of the GPU.", gpu.temperature_celsius),
        ("power_watts", "Power that the GPU draws.", gpu.power_watts),
        ("utilization_ratio", "Share of the time in which the GPU computed.", gpu.utilization_ratio),
        ("memory_used_bytes", "Memory of the GPU in use, by all processes.", gpu.used_bytes),
    ):
        if value is not None:
            yield _gauge(f"gpu_{name}", text, {gpu.pci_bus_id: value}, "pci_bus_id")
    if gpu.slowed_by is not None:
        slowed = {cause: cause in gpu.slowed_by for cause in ("heat", "power")}
        yield _gauge("gpu_slowed", "Whether the GPU's clocks are kept down, by cause.", slowed, "cause")


_Value = float | Mapping[str, float]
"""One number, or one by the value of a label."""


def _gauge(name: str, text: str, value: _Value, label: str = "") -> Metric:
    return _filled(GaugeMetricFamily(_PREFIX + name, text, labels=[label] if label else []), value)


def _counter(name: str, text: str, value: _Value, label: str = "") -> Metric:
    return _filled(CounterMetricFamily(_PREFIX + name, text, labels=[label] if label else []), value)


def _filled(metric: GaugeMetricFamily | CounterMetricFamily, value: _Value) -> Metric:
    if isinstance(value, Mapping):
        for label, number in value.items():
            metric.add_metric([label], float(number))
    else:
        metric.add_metric([], float(value))
    return metric
