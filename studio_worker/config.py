"""The configuration: ``config.toml``, then ``conf.d/*.toml`` in name order, then the environment.

Owns every setting and what is wrong with it: each fault becomes one :class:`ConfigError` that names file,
line, key and cure. Required models come from ``models.d``. Nothing here touches the network or the device.
Reading a file is config_files.py's work, a required model's shape is required.py's.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from studio_worker.config_files import Document, list_files, read_document, user
from studio_worker.errors import ConfigError
from studio_worker.files import own_like_folder
from studio_worker.models import RequiredModel, is_loopback, url_problem
from studio_worker.required import read_required

DEFAULT_DIR = Path("/etc/studio-worker")
ENV_PREFIX = "STUDIO_WORKER_"
_ENV_SEPARATOR = "__"


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


class ModelsSection(_Section):
    root: Path = Path("/var/lib/studio-worker/models")
    on_demand: bool = True
    budget_gb: float | None = Field(default=None, gt=0)
    allow_insecure_urls: bool = False
    max_connections: int = Field(default=32, ge=1, le=32)
    download_limit_mb_s: float | None = Field(default=None, gt=0)
    mirrors: Annotated[dict[str, str], AfterValidator(_mirrors)] = {}
    token_dir: Path | None = None
    ca_bundle: Path | None = None
    proxy: Annotated[str, AfterValidator(_proxy)] | None = None


class StateSection(_Section):
    dir: Path = Path("/var/lib/studio-worker")
    runtime_dir: Path = Path("/run/studio-worker")
    outbox_max_gb: float = Field(default=5.0, gt=0)
    outbox_max_days: float = Field(default=14.0, gt=0)


class LogSection(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


class MetricsSection(_Section):
    listen: Annotated[str, AfterValidator(_listen)] | None = None
    textfile: Path | None = None


class Settings(BaseSettings):
    """Every setting, with its default. ``packaging/config.toml`` explains each key."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=_ENV_SEPARATOR,
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


@dataclass(frozen=True)
class Config:
    """A complete, valid configuration."""

    settings: Settings
    required: tuple[RequiredModel, ...]


@dataclass(frozen=True)
class _Origin:
    source: str
    line: int | None = None


def load(directory: Path = DEFAULT_DIR) -> Config:
    """Read and check the configuration in ``directory``.

    Raises:
        ConfigError: the first fault found, with file, line, key and cure.
    """
    documents = [
        read_document(
            directory / "config.toml",
            cure_if_missing="install the package's config.toml there or name its folder with --config",
        )
    ]
    documents += [read_document(path) for path in list_files(directory / "conf.d", {".toml"})]
    merged: dict[str, dict[str, Any]] = {}
    origins: dict[str, _Origin] = {}
    for document in documents:
        _refuse_unknown(document)
        for section, values in document.values.items():
            for key, value in values.items():
                merged.setdefault(section, {})[key] = value
                name = f"{section}.{key}"
                origins[name] = _Origin(str(document.path), document.line_of_key(name))
    origins |= _environment_origins()
    try:
        settings = Settings(**merged)  # type: ignore[arg-type]  # pydantic checks and converts the values
    except ValidationError as error:
        raise _explain(error, origins) from error
    required = read_required(directory / "models.d", allow_insecure=settings.models.allow_insecure_urls)
    return Config(settings, required)


def check_folders(settings: Settings) -> None:
    """Make the worker's own folders where they are missing and see that they can be written.

    Raises:
        ConfigError: a folder cannot be made, read or written by this user.
    """
    for key, folder, mode in (
        ("state.dir", settings.state.dir, 0o700),
        ("models.root", settings.models.root, 0o755),
    ):
        try:
            if not folder.is_dir():
                folder.mkdir(mode=mode, parents=True, exist_ok=True)
                own_like_folder(folder)
            usable = os.access(folder, os.R_OK | os.W_OK | os.X_OK)
            problem = "cannot be read and written by this user"
        except OSError as error:
            usable, problem = False, f"cannot be made: {error.strerror}"
        except ValueError as error:  # a NUL byte
            usable, problem = False, f"cannot be made: {error}"
        if not usable:
            raise ConfigError(
                f"folder {folder} {problem}",
                key=key,
                cure=f"give user {user()} access to it or name another folder",
            )


def _known_keys() -> dict[str, list[str]]:
    return {
        section: sorted(field.default.__class__.model_fields)
        for section, field in Settings.model_fields.items()
    }


def _refuse_unknown(document: Document) -> None:
    known = _known_keys()
    for section, values in document.values.items():
        if section not in known:
            raise _unknown(document, section, section, [f"[{name}]" for name in known], f"[{section}]")
        if not isinstance(values, dict):
            raise ConfigError(
                "must be a section",
                source=str(document.path),
                line=document.line_of_key(section),
                key=section,
                cure=f"write [{section}] on a line of its own and the keys below it",
            )
        for key in values:
            if key not in known[section]:
                raise _unknown(document, f"{section}.{key}", key, known[section], key)


def _unknown(document: Document, dotted: str, name: str, candidates: list[str], wrong: str) -> ConfigError:
    near = difflib.get_close_matches(wrong, candidates, n=1, cutoff=0.5)
    home = next((section for section, keys in _known_keys().items() if name in keys), None)
    if home is not None:
        cure = f"it belongs under [{home}]"
    elif near:
        cure = f"did you mean {near[0]}?"
    else:
        cure = f"known here: {', '.join(candidates)}"
    return ConfigError(
        "unknown key" if "." in dotted or home is not None else "unknown section",
        source=str(document.path),
        line=document.line_of_key(dotted),
        key=dotted,
        cure=cure,
    )


def _environment_origins() -> dict[str, _Origin]:
    """Where each setting given by environment comes from. Raises ConfigError for a name not known."""
    known = {
        f"{ENV_PREFIX}{section}{_ENV_SEPARATOR}{key}".upper(): f"{section}.{key}"
        for section, keys in _known_keys().items()
        for key in keys
    }
    origins = {}
    for name in sorted(os.environ):
        if not name.upper().startswith(ENV_PREFIX):  # pydantic-settings reads lower case too
            continue
        if name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), list(known), n=1, cutoff=0.5)
            raise ConfigError(
                "unknown key",
                source=f"environment variable {name}",
                cure=f"did you mean {near[0]}?" if near else "unset it",
            )
        origins[known[name.upper()]] = _Origin(f"environment variable {name}")
    return origins


def _explain(error: ValidationError, origins: dict[str, _Origin]) -> ConfigError:
    first = error.errors(include_url=False)[0]
    section, name = (str(part) for part in first["loc"][:2])
    key = f"{section}.{name}"
    origin = origins.get(key, _Origin(""))
    default = getattr(Settings.model_fields[section].default, name)
    written = "none" if default is None else json.dumps(default, default=str)
    return ConfigError(
        f"{_shown(first['input'])}: {str(first['msg']).removeprefix('Value error, ')}",
        source=origin.source,
        line=origin.line,
        key=key,
        cure=f"change it or leave it out (default: {written})",
    )


def _shown(given: object) -> str:
    """A refused value for the operator, unless it looks like an address that holds a secret."""
    text = repr(given)
    if any(mark in text for mark in "@?#"):
        return "the value given"
    return text if len(text) <= 80 else f"{text[:79]}…"
