"""What the service says of itself, as typed facts: for ``status``, for metrics, for whoever asks.

The names are an interface: ``studio-worker status --json`` prints them and scripts read them. Keys are added,
never renamed. Readers ignore what they do not know and every part has a default, so that a command of one
version understands a service of another. Times ending in ``_at`` are Unix seconds, those in ``_s`` durations
that do not jump with the clock.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from studio_worker.plain import plain

Phase = Literal["starting", "provisioning", "ready", "draining", "stopping"]
"""``draining``: told to stop, the job in hand is being finished."""

Outcome = Literal["done", "failed", "handed_back", "refused", "unconfirmed"]
"""How a job ends here. ``done``: delivered. ``failed``: reported with its reason. ``handed_back``: stopped
because the worker ends, or must; another one makes it. ``refused``: made, but the studio did not take it.
``unconfirmed``: made, and probably delivered by a try whose answer was lost; the studio takes no other."""

NAME_CHARS = 200
"""Names may come from the studio; of what is kept and shown, each has no more."""

OUTCOMES: tuple[Outcome, ...] = ("done", "failed", "handed_back", "refused", "unconfirmed")


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    @field_validator("*", mode="before")
    @classmethod
    def _without_control_characters(cls, value: Any) -> Any:
        return plain(value) if isinstance(value, str) else value


class RegistrationFacts(_Facts):
    """Who this worker is to the studio. ``detail``: what the operator has to do, where there is something.
    ``ended``: a lane that the studio has rejected or deleted, while others go on.
    """

    state: Literal["unknown", "pending", "approved", "ended"] = "unknown"
    worker_id: str | None = None
    detail: str | None = None
    is_given: bool = False
    """By systemd credentials: there is no identity to reset."""


class SessionFacts(_Facts):
    """The connection to the studio, ``none`` before the first and of a lane that ended; ``reconnects`` counts
    the times it had to be made anew.
    """

    state: Literal["none", "connected", "reconnecting"] = "none"
    since_at: float | None = None
    reconnects: int = 0


class JobFacts(_Facts):
    """The job in hand. ``stage``: ``files``, ``prepare`` (its input pictures are decoded, and for the first
    job the engine's libraries loaded), ``turn`` (until it has the device), ``load`` (until the first step) or
    ``generate``.
    """

    job_id: str
    model: str
    stage: str = "files"
    step: int = 0
    steps: int | None = None
    steps_per_s: float | None = None
    began_at: float = 0.0
    elapsed_s: float = 0.0


class LaneFacts(_Facts):
    """One lane, from 1: to the studio a worker of its own."""

    lane: int
    registration: RegistrationFacts = RegistrationFacts()
    session: SessionFacts = SessionFacts()
    job: JobFacts | None = None


class EndedJob(_Facts):
    """A job that is over. ``stages_s`` maps wait, files, prepare, turn (where another lane had the device),
    load, generate, encode and upload to seconds.
    """

    job_id: str
    model: str
    outcome: Outcome
    reason: str | None = None
    retryable: bool | None = None
    stages_s: dict[str, float] = {}
    ended_at: float = 0.0


class OfferFacts(_Facts):
    """Answers to offers since the start. ``impossible`` ones were accepted and failed at once."""

    accepted: int = 0
    again: int = 0
    impossible: int = 0
    rejected: dict[str, int] = {}
    """By code: ``busy``, ``paused``, or ``other`` for those without a code."""


class UploadFacts(_Facts):
    """Deliveries since the start; ``retries`` counts those that had to be tried again."""

    delivered: int = 0
    refused: int = 0
    unconfirmed: int = 0
    retries: int = 0
    delivered_bytes: int = 0


class DownloadFacts(_Facts):
    """Downloads of model files since the start; ``received_bytes`` without what was there from earlier."""

    done: int = 0
    failed: int = 0
    received_bytes: int = 0


class OutboxFacts(_Facts):
    """Finished pictures that wait for delivery."""

    count: int = 0
    size_bytes: int = 0
    oldest_at: float | None = None
    uploading: str | None = None


class ResidentModel(_Facts):
    """A model that is loaded, and where: ``device``, ``ram`` or ``device and ram``; ``unpacked``: quantised
    weights of it are written out, which is faster and takes memory that nobody else wants.
    """

    model: str
    size_bytes: int
    place: str = "device"
    unpacked: bool = False


class GpuFacts(_Facts):
    """What the driver says of the GPU at ``pci_bus_id``, some seconds old at most; what it does not tell is
    missing. ``utilization_ratio``: the share of the time in use; ``used_bytes``: by all processes;
    ``slowed_by``: ``heat``, ``power``, both or nothing.
    """

    pci_bus_id: str
    temperature_celsius: float | None = None
    power_watts: float | None = None
    utilization_ratio: float | None = None
    used_bytes: int | None = None
    slowed_by: tuple[str, ...] | None = None


class DeviceFacts(_Facts):
    """The device pictures are made on; ``used_bytes`` is missing until something has been loaded, ``gpu`` on
    a CPU and where the driver does not tell.
    """

    name: str = ""
    description: str = ""
    total_bytes: int = 0
    used_bytes: int | None = None
    gpu: GpuFacts | None = None


class HeldFacts(_Facts):
    """Jobs that are not taken until ``until_at``, since others failed: of ``model``, or (without) of any;
    ``only_fetching``: only those for which something has to be downloaded.
    """

    model: str | None = None
    failures: int = 0
    reason: str = ""
    until_at: float = 0.0
    only_fetching: bool = False


class HealthFacts(_Facts):
    """Failures that are this box's own: ``failures`` in a row so far, ``failed_tries`` of the device in a row
    after that, and what is held back.
    """

    failures: int = 0
    failed_tries: int = 0
    held: tuple[HeldFacts, ...] = ()


class TurnFacts(_Facts):
    """Turns at the device: how often the model of one was another than that of the turn before, and how often
    one whose model was loaded came before an older one.
    """

    switches: int = 0
    switches_saved: int = 0


class ProcessFacts(_Facts):
    """This process, and how often there was one: ``starts`` and ``crashes`` outlive it.

    A crash is a process that left no note of its end: killed, out of memory, power cut.
    """

    pid: int = 0
    started_at: float = 0.0
    uptime_s: float = 0.0
    memory_bytes: int = 0
    starts: int = 0
    crashes: int = 0
    last_crash_at: float | None = None


class Snapshot(_Facts):
    """Everything at one moment."""

    version: str = ""
    studio: str = ""
    phase: Phase = "starting"
    status: str = ""
    """The line that ``systemctl status`` shows."""
    hangs: str = ""
    """What makes no progress any more, so that only a restart helps; empty = nothing."""
    paused: bool = False
    ready_after_s: float | None = None
    """From the service's start to READY."""
    process: ProcessFacts = ProcessFacts()
    registration: RegistrationFacts = RegistrationFacts()
    session: SessionFacts = SessionFacts()
    health: HealthFacts = HealthFacts()
    job: JobFacts | None = None
    lanes: tuple[LaneFacts, ...] = ()
    """``registration``, ``session`` and ``job`` are those of the first lane that has the like."""
    last_jobs: tuple[EndedJob, ...] = ()
    """Newest first."""
    jobs: dict[str, int] = {}
    """Ended since the start, by outcome."""
    stages_s: dict[str, float] = {}
    """Seconds spent by all jobs since the start, by stage."""
    offers: OfferFacts = OfferFacts()
    uploads: UploadFacts = UploadFacts()
    downloads: DownloadFacts = DownloadFacts()
    outbox: OutboxFacts = OutboxFacts()
    device: DeviceFacts = DeviceFacts()
    resident: tuple[ResidentModel, ...] = ()
    turns: TurnFacts = TurnFacts()
