"""Every setting: its section, key, type, default, limits, text, and whether a reload applies it.

A new key is declared here and nowhere else; ``make docs`` writes it into config.toml and the man page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from studio_worker.config.declaration import setting
from studio_worker.config.values import (
    Absolute,
    DeviceName,
    Format,
    Level,
    Listen,
    Mirrors,
    Proxy,
    StudioUrl,
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_true(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:  # pydantic takes it for 1
            raise ValueError("must be a number, not true or false")
        return value


class StudioSection(_Section):
    api_base_url: StudioUrl = setting(
        "https://studio.minis.gg",
        "The studio to work for. For a studio of your own: `studio-worker local-studio` prints its address. "
        "A worker that was approved elsewhere needs no registration: give its id and its token as the "
        "systemd credentials studio-worker.worker-id and studio-worker.auth-token (LoadCredential=), both or "
        "neither.",
        live=False,
    )
    reconnect_attempts: int = setting(
        0,
        "After how many failed connections in a row the service ends (exit status 75). 0 = never, keep "
        "trying.",
        live=True,
        ge=0,
    )


class WorkerSection(_Section):
    device: DeviceName = setting(
        "auto",
        "auto = the machine's NVIDIA GPU (an error where it has none or it is unusable), cuda, cuda:N, or "
        "cpu.",
        live=False,
    )
    vram_threshold_gb: float | None = setting(
        None,
        "The largest job, by the studio's estimate in GiB, that this box accepts. Default: the device's "
        "memory.",
        live=True,
        example=16.0,
        gt=0,
    )
    lanes: int = setting(
        1,
        "How many jobs this box has in hand at once. One at a time is on the device; meanwhile the others' "
        "files are fetched, their pictures encoded and uploaded, so that the device need not wait for the "
        "network. To the studio each lane is a worker of its own, and is approved by itself: NAME, NAME "
        "(lane 2), and so on. Two for most networks, three where an upload takes longer than a picture; each "
        "takes 20 MB of RAM more for a picture of 1024 pixels a side, and no memory of the GPU.",
        live=False,
        ge=1,
        le=8,
    )
    step_timeout_s: float = setting(
        300.0,
        "A step of a job, or a component of its model to load, that takes longer than this many seconds "
        "counts as hung.",
        live=True,
        gt=0,
    )
    stop_timeout_s: float = setting(
        240.0,
        "How long a stop waits for the job in hand, in seconds, before it is handed back to the studio. "
        "systemd gives the service that time, whatever the unit says.",
        live=True,
        gt=0,
        le=86_400,
    )
    preload: bool = setting(
        False,
        "Whether the required models are loaded right after the start, as many as fit in memory together, "
        "instead of when their first job comes. A job that comes meanwhile is not kept waiting for more than "
        "one component.",
        live=False,
    )
    compile: bool = setting(
        False,
        "Whether torch compiles the models' repeated blocks: the first picture of a model, and of each new "
        "size, takes up to minutes, later ones less than without. Needs a compiler (apt install g++; "
        "from source python3-dev too); READY waits until it was tried out. Quantised (GGUF) models and jobs "
        "with LoRAs or offload run uncompiled.",
        live=False,
    )


class ModelsSection(_Section):
    root: Absolute = setting(
        Path("/var/lib/studio-worker/models"),
        "Where model files are kept. Another folder must belong to the user studio-worker, and the unit must "
        "be let in: `systemctl edit studio-worker`, [Service], ReadWritePaths=FOLDER. On a disk of its own, "
        "[Unit], RequiresMountsFor=FOLDER has the service wait for it.",
        live=False,
    )
    on_demand: bool = setting(
        True,
        "Whether an offer may bring a model that is not in models.d (it is then downloaded for that job, "
        "where its headers do not say that this box cannot serve it).",
        live=True,
    )
    budget_gb: float | None = setting(
        None,
        "How much the folder may hold, in GB. Before a model beyond it is fetched for a job, those in "
        "models.d are kept and the others are removed, least recently used first, until it fits. Default: as "
        "much as the disk holds.",
        live=True,
        example=100.0,
        gt=0,
    )
    allow_insecure_urls: bool = setting(
        False,
        "Whether plain http is allowed beyond loopback for model and input files, and whether what a job "
        "names may come from private networks and this machine. Without it that comes from public addresses "
        "and from the host and port of [studio] api_base_url, in whatever network that is; model files from "
        "mirrors too, and from this machine where the studio is on it. Models in models.d come from "
        "anywhere. Link-local addresses stay refused in any case.",
        live=True,
    )
    max_connections: int = setting(
        32,
        "How many connections all downloads together take at most. Each starts with one, and adds while they "
        "bring more.",
        live=True,
        ge=1,
        le=32,
    )
    download_limit_mb_s: float | None = setting(
        None,
        "All downloads together take at most so many megabytes a second. Default: no limit.",
        live=True,
        example=50.0,
        gt=0,
    )
    connect_timeout_s: float = setting(
        15.0, "How many seconds a download waits for a connection.", live=True, gt=0, le=300
    )
    first_byte_timeout_s: float = setting(
        60.0,
        "How many for the first byte of an answer, which a cache that has to fetch the file itself sends "
        "late.",
        live=True,
        gt=0,
        le=3600,
    )
    stall_timeout_s: float = setting(
        15.0,
        "How many for more bytes, before it connects anew and goes on where it was.",
        live=True,
        gt=0,
        le=3600,
    )
    mirrors: Mirrors = setting(
        {},
        "Mirrors: an address that begins with the left side is first asked for with the right side in its "
        "place.",
        live=True,
        example={"https://huggingface.co/": "https://mirror.example/hf/"},
    )
    token_dir: Absolute | None = setting(
        None,
        "A folder with bearer tokens for downloads: a file download-token.<host> for each host, readable by "
        "the service's user alone. systemd credentials of that name (LoadCredential=) are read without this "
        "key.",
        live=True,
        example="/etc/studio-worker/tokens",
    )
    ca_bundle: Absolute | None = setting(
        None,
        "Certificates to trust instead of the system's. Default: REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE, "
        "SSL_CERT_FILE.",
        live=True,
        example="/etc/ssl/certs/site.pem",
    )
    proxy: Proxy | None = setting(
        None,
        "A proxy for downloads. Default: HTTPS_PROXY and HTTP_PROXY; NO_PROXY is heeded either way.",
        live=True,
        example="http://proxy.example:3128",
    )


class StateSection(_Section):
    dir: Absolute = setting(
        Path("/var/lib/studio-worker"),
        "Identity, the job in hand, finished pictures that wait for delivery.",
        live=False,
    )
    runtime_dir: Absolute = setting(
        Path("/run/studio-worker"),
        "Where the running service can be asked (`studio-worker status`, `pause`, `resume`): it makes a "
        "socket there for root and its own user. Under systemd the unit's RuntimeDirectory= is used instead; "
        "the two should agree.",
        live=False,
    )
    outbox_max_gb: float = setting(
        5.0,
        "How much may wait for delivery, in GB, before the worker takes no further jobs. Several thousand "
        "pictures.",
        live=False,
        gt=0,
    )
    outbox_max_days: float = setting(
        14.0,
        "How many days of running a picture is offered to the studio before it is dropped, with a line in "
        "the log.",
        live=False,
        gt=0,
    )


class LogSection(_Section):
    level: Level = setting("info", "debug, info, warning or error", live=True)
    format: Format = setting(
        "auto", "auto = JSON lines, or readable text on a terminal; json; text", live=True
    )


class MetricsSection(_Section):
    listen: Listen | None = setting(
        None,
        "Where Prometheus can ask, on this machine only, as http://ADDRESS/metrics. Default: nowhere. Each "
        "instance of studio-worker@ needs a port of its own: `systemctl edit studio-worker@1`, [Service], "
        "Environment=STUDIO_WORKER_METRICS__LISTEN=127.0.0.1:9465",
        live=False,
        example="127.0.0.1:9464",
    )
    textfile: Absolute | None = setting(
        None,
        "A file for node_exporter's textfile collector, of one instance alone, written every 15 s and "
        "removed at a clean stop. Its folder must be writable for the user studio-worker (chgrp, chmod g+w), "
        "and for the unit: `systemctl edit studio-worker`, [Service], ReadWritePaths=FOLDER. Default: none.",
        live=False,
        example="/var/lib/prometheus/node-exporter/studio-worker.prom",
    )
