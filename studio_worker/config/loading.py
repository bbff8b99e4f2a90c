"""The configuration: ``config.toml``, then ``conf.d/*.toml`` in name order, then the environment.

Each fault becomes one :class:`ConfigError` that names file, line, key and cure. Required models come from
``models.d``. Nothing here touches the network or the device. The settings themselves are in sections.py,
reading a file is documents.py's work, a required model's shape is required.py's.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from studio_worker.config.declaration import Declared
from studio_worker.config.documents import Document, list_files, read_document
from studio_worker.config.required import read_required
from studio_worker.config.settings import DECLARED, ENV_PREFIX, ENV_SEPARATOR, Settings, SettingsError
from studio_worker.errors import ConfigError, StateUnavailable
from studio_worker.models import RequiredModel
from studio_worker.wording import fault, in_container, user, volume_cure

DEFAULT_DIR = Path("/etc/studio-worker")


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
    except SettingsError as error:
        raise _no_json() from error
    required = read_required(directory / "models.d", allow_insecure=settings.models.allow_insecure_urls)
    return Config(settings, required)


def check_folders(settings: Settings, *, make: bool = True) -> None:
    """Make the worker's own folders where they are missing and see that they can be written.

    Args:
        make: ``False`` only looks whether they could be made.

    Raises:
        ConfigError: a folder cannot be made, read or written by this user.
    """
    for key, folder, mode in (
        ("state.dir", settings.state.dir, 0o700),
        ("models.root", settings.models.root, 0o755),
    ):
        may_pass = key == "state.dir" and os.path.isdir(folder)  # noqa: PTH112
        try:
            if (link := _dangling(folder)) is not None:
                raise StateUnavailable(
                    f"folder {folder}: {link} is a link to {link.readlink()}, which is not there",
                    key=key,
                    cure="mount the disk that it lies on, or name another folder",
                )
            if make and not folder.is_dir():
                folder.mkdir(mode=mode, parents=True, exist_ok=True)
            there = folder if make else _nearest(folder)
            usable = os.access(there, os.R_OK | os.W_OK | os.X_OK)
            problem = "cannot be read and written by this user"
            if there != folder:
                problem = f"cannot be made: this user may not write to {there}"
            is_read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
        except OSError as error:
            usable, problem = False, f"cannot be made: {error.strerror}"
            is_read_only = error.errno == errno.EROFS
        except ValueError as error:  # a NUL byte
            usable, problem, is_read_only = False, f"cannot be made: {error}", False
        if not usable:
            if is_read_only:
                problem = "lies where everything is read-only"
            elif in_container():
                may_pass = False  # what is mounted there was mounted before this process began
            raise (StateUnavailable if may_pass else ConfigError)(
                f"folder {folder} {problem}",
                key=key,
                cure=_unit_cure(folder) if is_read_only else _access_cure(folder),
            )

    if settings.metrics.textfile is not None:
        _check_textfile(settings.metrics.textfile)


def _check_textfile(path: Path) -> None:
    """What the start would meet first. Raises ConfigError."""
    folder = path.parent
    if not folder.is_dir():
        problem = f"{folder} is not there"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = f"{folder} cannot be written to by this user"
    else:
        return
    raise ConfigError(
        problem,
        key="metrics.textfile",
        cure=f"{_unit_cure(folder)}, or leave the key out",
    )


def _nearest(folder: Path) -> Path:
    """``folder``, or what of the path to it is there. Raises NotADirectoryError where that is a file."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    return there


def _dangling(folder: Path) -> Path | None:
    """What of ``folder`` is a link to nowhere: to a disk that is not mounted, most likely."""
    links = (each for each in (folder, *folder.parents) if each.is_symlink())
    return next((each for each in links if not each.exists()), None)


def _unit_cure(folder: Path) -> str:
    if in_container():
        return volume_cure(folder)
    made = "" if folder.is_dir() else "make it and "
    return (
        f"{made}let the unit write there (systemctl edit studio-worker, [Service], ReadWritePaths={folder}) "
        "or mount it writable"
    )


def _access_cure(folder: Path) -> str:
    """Most likely a person asks, with a user of their own, about the folders of the service's user."""
    if in_container():
        return volume_cure(folder)
    access = f"give user {user()} access to it or name another folder"
    with contextlib.suppress(OSError, KeyError):  # not there, or of a user without a name
        if folder.stat().st_uid not in {0, os.geteuid()}:
            return f"it belongs to user {folder.owner()}: run the command with sudo, or {access}"
    return access


def _known_keys() -> dict[str, list[str]]:
    known: dict[str, list[str]] = {}
    for each in DECLARED.values():
        known.setdefault(each.section, []).append(each.name)
    return {section: sorted(names) for section, names in known.items()}


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
    known = {_variable(each): key for key, each in DECLARED.items()}
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


def _variable(setting: Declared) -> str:
    return f"{ENV_PREFIX}{setting.section}{ENV_SEPARATOR}{setting.name}".upper()


def _no_json() -> ConfigError:
    """A table comes from the environment as JSON; the library's words name the section alone."""
    tables = {_variable(each) for each in DECLARED.values() if isinstance(each.default, dict)}
    named = next((name for name in sorted(os.environ) if name.upper() in tables), "")
    return ConfigError(
        "is not valid JSON",
        source=f"environment variable {named}" if named else "the environment",
        cure='write a table as {"name": "value"}',
    )


def _explain(error: ValidationError, origins: dict[str, _Origin]) -> ConfigError:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"][:2])
    origin = origins.get(key, _Origin(""))
    default = DECLARED[key].default
    written = "none" if default is None else json.dumps(default, default=str)
    return ConfigError(
        f"{_shown(first['input'])}: {fault(first)}",
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
