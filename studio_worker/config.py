"""The configuration: ``config.toml``, then ``conf.d/*.toml`` in name order, then the environment.

Owns every setting and what is wrong with it: each fault becomes one :class:`ConfigError` that names file,
line, key and cure. Required models come from ``models.d``. Nothing here touches the network or the device.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from studio_worker.errors import ConfigError
from studio_worker.models import RequiredModel, url_problem

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
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StudioSection(_Section):
    api_base_url: Annotated[str, AfterValidator(_studio_url)] = "https://studio.minis.gg"
    reconnect_attempts: int = Field(default=0, ge=0)


class WorkerSection(_Section):
    device: Annotated[str, AfterValidator(_device)] = "auto"
    vram_threshold_gb: float | None = Field(default=None, gt=0)
    step_timeout_s: float = Field(default=300.0, gt=0)
    stop_timeout_s: float = Field(default=240.0, gt=0)


class ModelsSection(_Section):
    root: Path = Path("/var/lib/studio-worker/models")
    on_demand: bool = True
    allow_insecure_urls: bool = False


class StateSection(_Section):
    dir: Path = Path("/var/lib/studio-worker")


class LogSection(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


class Settings(BaseSettings):
    """Every setting, with its default. ``packaging/config.toml`` explains each key."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter=_ENV_SEPARATOR, extra="forbid", frozen=True
    )

    studio: StudioSection = StudioSection()
    worker: WorkerSection = WorkerSection()
    models: ModelsSection = ModelsSection()
    state: StateSection = StateSection()
    log: LogSection = LogSection()

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
    main = directory / "config.toml"
    if not main.is_file():
        raise ConfigError(
            "no such file",
            source=str(main),
            cure="install the package's config.toml there or name another folder with --config",
        )
    merged: dict[str, dict[str, Any]] = {}
    origins: dict[str, _Origin] = {}
    for path in (main, *sorted((directory / "conf.d").glob("*.toml"))):
        for section, values in _read_toml(path).items():
            for key, value in values.items():
                merged.setdefault(section, {})[key] = value
                origins[f"{section}.{key}"] = _Origin(str(path), _line_of(_read_text(path), section, key))
    origins |= _environment_origins()
    try:
        settings = Settings(**merged)  # type: ignore[arg-type]  # pydantic checks and converts the values
    except ValidationError as error:
        raise _explain(error, origins) from error
    required = _read_required(directory / "models.d", allow_insecure=settings.models.allow_insecure_urls)
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
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
            usable = os.access(folder, os.R_OK | os.W_OK | os.X_OK)
            problem = "cannot be read and written by this user"
        except OSError as error:
            usable, problem = False, f"cannot be made: {error.strerror}"
        if not usable:
            raise ConfigError(
                f"folder {folder} {problem}",
                key=key,
                cure=f"give user {_user()} access to it or name another folder",
            )


def _user() -> str:
    return os.environ.get("USER") or str(os.getuid())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", source=str(path), cure=f"give user {_user()} access to it"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", source=str(path), cure="save it as UTF-8") from error


def _parse_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_read_text(path))
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ConfigError(
            f"is not valid TOML: {error}",
            source=str(path),
            line=int(line[1]) if line else None,
            cure="mend the syntax (text values need quotes)",
        ) from error


def _read_toml(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of one file, with every unknown section and key refused."""
    document = _parse_toml(path)
    known = {name: set(field.default.__class__.model_fields) for name, field in Settings.model_fields.items()}
    for section, values in document.items():
        if section not in known:
            raise _unknown(path, section, "", known, [f"[{name}]" for name in known], f"[{section}]")
        if not isinstance(values, dict):
            raise ConfigError(
                "must be a section", source=str(path), key=section, cure=f"write [{section}] on its own line"
            )
        for key in values:
            if key not in known[section]:
                raise _unknown(path, section, key, known, sorted(known[section]), key)
    return document


def _unknown(
    path: Path, section: str, key: str, known: dict[str, set[str]], candidates: list[str], wrong: str
) -> ConfigError:
    near = difflib.get_close_matches(wrong, candidates, n=1, cutoff=0.5)
    elsewhere = [name for name, keys in known.items() if key and key in keys]
    if elsewhere:
        cure = f"it belongs under [{elsewhere[0]}]"
    elif near:
        cure = f"did you mean {near[0]}?"
    else:
        cure = f"known here: {', '.join(candidates)}"
    return ConfigError(
        "unknown key" if key else "unknown section",
        source=str(path),
        line=_line_of(_read_text(path), section, key),
        key=f"{section}.{key}" if key else section,
        cure=cure,
    )


def _line_of(text: str, section: str, key: str) -> int | None:
    """The 1-based line on which ``key`` of ``[section]`` stands (tomllib does not tell)."""
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            current = header[1].strip("\"' ")
            if not key and current == section:
                return number
        elif assigned := re.match(r"\s*([\w.\"'-]+)\s*=", line):
            dotted = f"{current}.{assigned[1]}" if current else assigned[1]
            if dotted.replace('"', "").replace("'", "") in {f"{section}.{key}", section}:
                return number
    return None


def _environment_origins() -> dict[str, _Origin]:
    """Where each setting given by environment comes from. Raises ConfigError for a name not known."""
    known = {
        f"{ENV_PREFIX}{section}{_ENV_SEPARATOR}{key}".upper(): f"{section}.{key}"
        for section, field in Settings.model_fields.items()
        for key in field.default.__class__.model_fields
    }
    origins = {}
    for name in sorted(os.environ):
        if not name.startswith(ENV_PREFIX):
            continue
        if name.upper() not in known:
            near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
            raise ConfigError(
                "unknown key",
                source=f"environment variable {name}",
                cure=f"did you mean {near[0]}?" if near else "unset it",
            )
        origins[known[name.upper()]] = _Origin(f"environment variable {name}")
    return origins


def _explain(error: ValidationError, origins: dict[str, _Origin]) -> ConfigError:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"][:2])
    origin = origins.get(key, _Origin(""))
    problem = str(first["msg"]).removeprefix("Value error, ")
    given = first.get("input")
    if "@" in str(given):  # an address with user info: its password must not reach the log
        given = "the value given"
    section, _, name = key.partition(".")
    default = getattr(Settings.model_fields[section].default, name)
    return ConfigError(
        f"{given!r}: {problem}",
        source=origin.source,
        line=origin.line,
        key=key,
        cure=f"change it (default: {default})",
    )


# --- required models --------------------------------------------------------------------------------


def _read_required(directory: Path, *, allow_insecure: bool) -> tuple[RequiredModel, ...]:
    required: dict[str, tuple[RequiredModel, Path]] = {}
    paths = [p for p in sorted(directory.glob("*")) if p.suffix in {".json", ".toml"}]
    for path in paths:
        model = _read_model(path, allow_insecure=allow_insecure)
        if model.id in required:
            raise ConfigError(
                f"the same id as in {required[model.id][1]}", source=str(path), key="id", cure="remove one"
            )
        required[model.id] = model, path
    return tuple(model for model, _ in required.values())


def _read_model(path: Path, *, allow_insecure: bool) -> RequiredModel:
    text = _read_text(path)
    if path.suffix == ".toml":
        document: Any = _parse_toml(path)
    else:
        try:
            document = json.loads(text)
        except ValueError as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else None
            raise ConfigError(
                f"is not valid JSON: {error}", source=str(path), line=line, cure="mend the syntax"
            ) from error
    try:
        model = RequiredModel.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            str(first["msg"]).removeprefix("Value error, "),
            source=str(path),
            line=_line_containing(text, str(first["loc"][-1]) if first["loc"] else ""),
            key=key,
            cure="compare with the examples in the package's documentation folder",
        ) from error
    for index, file in enumerate(model.files):
        if file.sha256 is None:
            raise ConfigError(
                f"{file.filename} has no hash, so it could never be verified",
                source=str(path),
                line=_line_containing(text, file.filename),
                key=f"files.{index}.sha256",
                cure="add its sha256 (64 hexadecimal digits; sha256sum FILE prints it)",
            )
        if problem := url_problem(file.url, allow_insecure=allow_insecure):
            raise ConfigError(
                f"{file.filename}: its url {problem}",
                source=str(path),
                line=_line_containing(text, '"url"' if path.suffix == ".json" else "url"),
                key=f"files.{index}.url",
                cure="give an https address",
            )
    return model


def _line_containing(text: str, word: str) -> int | None:
    if not word:
        return None
    return next((n for n, line in enumerate(text.splitlines(), 1) if word in line), None)
