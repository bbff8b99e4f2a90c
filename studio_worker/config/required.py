"""The required models: one file each in ``models.d``, in the shape of a studio's registry entry.

Owns what is wrong with such a file. Every file of a required model needs its hash, because READY promises
that all of them are verified; and it must be a model that this worker can serve, as far as its entry tells.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from studio_worker.config.documents import Document, list_files, read_document
from studio_worker.errors import ConfigError
from studio_worker.models import RequiredModel
from studio_worker.network.urls import url_problem
from studio_worker.wording import fault

ENGINES = frozenset({"onnx", "sd-cpp", "synthetic"})
"""What this package has; a required model of another would never be served."""

_WITHOUT_FILES = frozenset({"synthetic"})
_ROLES = ("model", "diffusion-model")
"""Of files that make a model; the others only complete one."""


def read_required(directory: Path, *, allow_insecure: bool) -> tuple[RequiredModel, ...]:
    """Every model that ``directory`` names, in file name order.

    Raises:
        ConfigError: the first fault found, with file, line where possible, key and cure.
    """
    required: dict[str, tuple[RequiredModel, Path]] = {}
    for path in list_files(directory, {".json", ".toml"}):
        document = read_document(path)
        model = _read_model(document)
        _check_served(document, model)
        _check_files(document, model, allow_insecure=allow_insecure)
        if model.id in required:
            raise ConfigError(
                f"{model.id!r} is the id in {required[model.id][1]} too",
                source=str(path),
                line=document.line_containing("id", model.id),
                key="id",
                cure="remove one of the two files",
            )
        required[model.id] = model, path
    return tuple(model for model, _ in required.values())


def _read_model(document: Document) -> RequiredModel:
    if not isinstance(document.values, dict):
        raise ConfigError(
            "does not hold one object",
            source=str(document.path),
            line=1,
            cure="write one model a file: { id, engine, files }",
        )
    try:
        return RequiredModel.model_validate(document.values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            fault(first),
            source=str(document.path),
            line=_line(document, str(first["loc"][-1]), first["input"]),
            key=".".join(str(part) for part in first["loc"]),
            cure="compare with the examples in the package's documentation folder",
        ) from error


def _check_served(document: Document, model: RequiredModel) -> None:
    def refuse(key: str, given: object, problem: str, cure: str) -> ConfigError:
        line = _line(document, key, given)
        return ConfigError(problem, source=str(document.path), line=line, key=key, cure=cure)

    if model.kind != "image":
        raise refuse("kind", model.kind, f"{model.kind!r} is not served here", "this worker makes images")
    if model.engine not in ENGINES:
        known = ", ".join(sorted(ENGINES))
        raise refuse("engine", model.engine, f"unknown engine {model.engine!r}", f"known are {known}")
    if model.engine not in _WITHOUT_FILES and not any(file.role in _ROLES for file in model.files):
        raise refuse(
            "files", model.id, f"no file of role {' or '.join(_ROLES)}", "name the file of the model itself"
        )


def _check_files(document: Document, model: RequiredModel, *, allow_insecure: bool) -> None:
    for index, file in enumerate(model.files):
        if file.sha256 is None:
            raise ConfigError(
                f"{file.filename} has no hash, so it could never be verified",
                source=str(document.path),
                line=_line(document, "filename", file.filename),
                key=f"files.{index}.sha256",
                cure="add its sha256 (64 hexadecimal digits; sha256sum FILE prints it)",
            )
        if problem := url_problem(file.url, allow_insecure=allow_insecure):
            raise ConfigError(
                f"{file.filename}: its url {problem}",
                source=str(document.path),
                line=_line(document, "url", file.url),
                key=f"files.{index}.url",
                cure="give an https address",
            )


def _line(document: Document, key: str, given: object) -> int | None:
    if isinstance(given, dict):  # the key is missing: point at what the object does say of itself
        marks = [(name, given[name]) for name in ("filename", "url", "id", "engine") if name in given]
        return next((_line(document, name, value) for name, value in marks if isinstance(value, str)), None)
    return document.line_containing(key, str(given)) or document.line_containing(key)
