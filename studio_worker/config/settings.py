"""Every setting: its section, key, type, default and limits. ``packaging/config.toml`` explains each key.

Where the values come from, and what is said of a wrong one, is loading.py's work.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as SettingsError

from studio_worker.network.urls import is_loopback, url_problem

ENV_PREFIX = "STUDIO_WORKER_"
ENV_SEPARATOR = "__"


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("must be auto, cuda, cuda:N or cpu")
    return value


def _studio_url(value: str) -> str:
    # Plain http is allowed here: a studio of one's own on the local network often has nothing else.
    if problem := url_problem(value, allow_insecure=True):
        raise ValueError(problem)
    if "@" in urlsplit(value).netloc:
        # It would replace the worker's own token in every request, and show up wherever the address does.
        raise ValueError("holds a user name or password; a worker signs in with its own token")
    return value


def _mirrors(value: dict[str, str]) -> dict[str, str]:
    for url in (*value, *value.values()):
        if problem := url_problem(url, allow_insecure=True):
            raise ValueError(f"an address of a mirror {problem}")
    return value


def _proxy(value: str) -> str:
    if problem := url_problem(value, allow_insecure=True):
        raise ValueError(problem)
    return value


def _listen(value: str) -> str:
    host, port = listen_address(value)
    if not is_loopback(host) or not 0 < port < 65_536:
        raise ValueError("must be an address of this machine alone and a port, e.g. 127.0.0.1:9464")
    return value


def listen_address(value: str) -> tuple[str, int]:
    """Host and port of ``host:port``; port 0 where there is none. Raises ValueError."""
    parts = urlsplit(f"//{value}")
    return parts.hostname or "", parts.port or 0


def _absolute(value: Path) -> Path:
    # Of a service: it has no folder that it is in, and its home is no person's.
    if not value.is_absolute():
        raise ValueError("must be an absolute path, one that begins with /")
    return value


Absolute = Annotated[Path, AfterValidator(_absolute)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class StudioSection(_Section):
    api_base_url: Annotated[str, AfterValidator(_studio_url)] = "https://studio.minis.gg"
    reconnect_attempts: int = Field(default=0, ge=0)


class WorkerSection(_Section):
    device: Annotated[str, AfterValidator(_device)] = "auto"
    vram_threshold_gb: float | None = Field(default=None, gt=0)
    step_timeout_s: float = Field(default=300.0, gt=0)
    stop_timeout_s: float = Field(default=240.0, gt=0, le=86_400)
    preload: bool = False
    compile: bool = False


class ModelsSection(_Section):
    root: Absolute = Path("/var/lib/studio-worker/models")
    on_demand: bool = True
    budget_gb: float | None = Field(default=None, gt=0)
    allow_insecure_urls: bool = False
    max_connections: int = Field(default=32, ge=1, le=32)
    download_limit_mb_s: float | None = Field(default=None, gt=0)
    connect_timeout_s: float = Field(default=15.0, gt=0, le=300)
    first_byte_timeout_s: float = Field(default=60.0, gt=0, le=3600)
    stall_timeout_s: float = Field(default=15.0, gt=0, le=3600)
    mirrors: Annotated[dict[str, str], AfterValidator(_mirrors)] = {}
    token_dir: Absolute | None = None
    ca_bundle: Absolute | None = None
    proxy: Annotated[str, AfterValidator(_proxy)] | None = None


class StateSection(_Section):
    dir: Absolute = Path("/var/lib/studio-worker")
    runtime_dir: Absolute = Path("/run/studio-worker")
    outbox_max_gb: float = Field(default=5.0, gt=0)
    outbox_max_days: float = Field(default=14.0, gt=0)


class LogSection(_Section):
    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = "info"
    format: Annotated[Literal["auto", "json", "text"], BeforeValidator(_lower)] = "auto"


class MetricsSection(_Section):
    listen: Annotated[str, AfterValidator(_listen)] | None = None
    textfile: Absolute | None = None


class Settings(BaseSettings):
    """The whole of them."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_SEPARATOR,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    studio: StudioSection = StudioSection()
    worker: WorkerSection = WorkerSection()
    models: ModelsSection = ModelsSection()
    state: StateSection = StateSection()
    log: LogSection = LogSection()
    metrics: MetricsSection = MetricsSection()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  (the signature is the library's)
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The files' values come in as init arguments; the environment wins over them.
        return env_settings, init_settings
